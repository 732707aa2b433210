import java.io.IOException;
import java.net.URI;
import java.net.URLEncoder;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Optional;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Asks kms-agent for a secret and prints its value: java GetSecret.java NAME
 *
 * <p>Java 17 or newer, nothing else. The token: KMS_TOKEN (the token itself, or file:///path), else the file
 * /var/run/kmstoken. The agent: KMS_AGENT, else http://localhost:2025.
 */
public class GetSecret {
    // One client for the whole program keeps its connection. No proxy: it would learn both token and secret.
    private static final HttpClient CLIENT =
            HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).proxy(HttpClient.Builder.NO_PROXY).build();

    /** Read for each request: it may be rotated while a program runs. */
    static String token() throws IOException {
        String value = Optional.ofNullable(System.getenv("KMS_TOKEN")).orElse("file:///var/run/kmstoken");
        if (value.startsWith("file://")) {
            value = Files.readString(Path.of(value.substring("file://".length())));
        }
        return value.trim();
    }

    static String getSecret(String name) throws IOException, InterruptedException {
        String agent = Optional.ofNullable(System.getenv("KMS_AGENT")).orElse("http://localhost:2025");
        String query = "secretId=" + URLEncoder.encode(name, StandardCharsets.UTF_8);
        HttpRequest request = HttpRequest.newBuilder(URI.create(agent + "/secretsmanager/get?" + query))
                .header("X-KMS-Token", token())
                .timeout(Duration.ofSeconds(15))
                .build();
        var reply = CLIENT.send(request, BodyHandlers.ofString());
        if (reply.statusCode() != 200) {
            // The body says why: {"Code": .., "Message": .., "RequestId": ..}
            throw new IOException(reply.statusCode() + " " + reply.body());
        }
        return secretData(reply.body());
    }

    /** What a JSON library would do, such as Jackson: new ObjectMapper().readTree(json).get("SecretData").asText() */
    private static String secretData(String json) throws IOException {
        Matcher member = Pattern.compile("\"SecretData\"\\s*:\\s*\"((?:[^\"\\\\]|\\\\.)*+)\"").matcher(json);
        if (!member.find()) {
            throw new IOException("a reply without SecretData");
        }
        return Pattern.compile("\\\\(u([0-9a-fA-F]{4})|.)").matcher(member.group(1)).replaceAll(escape -> {
            String text = switch (escape.group(1).charAt(0)) {
                case 'u' -> String.valueOf((char) Integer.parseInt(escape.group(2), 16));
                case 'n' -> "\n";
                case 'r' -> "\r";
                case 't' -> "\t";
                case 'b' -> "\b";
                case 'f' -> "\f";
                default -> escape.group(1);
            };
            return Matcher.quoteReplacement(text);
        });
    }

    public static void main(String[] args) throws InterruptedException {
        if (args.length != 1) {
            System.err.println("usage: java GetSecret.java NAME");
            System.exit(2);
        }
        try {
            System.out.println(getSecret(args[0]));
        } catch (IOException error) {
            // The message of a missing file is its name alone; some exceptions have none.
            boolean bare = error.getMessage() == null || error instanceof FileSystemException;
            System.err.println(bare ? error : error.getMessage());
            System.exit(1);
        }
    }
}

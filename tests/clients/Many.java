import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.stream.IntStream;

/** ResponseType 0: HttpClient as it comes (it asks for HTTP/2 first) and with HTTP/1.1. Arguments: URL, token. */
public class Many {
    public static void main(String[] args) throws Exception {
        for (HttpClient.Version version : HttpClient.Version.values()) {
            HttpClient client = HttpClient.newBuilder().version(version).build();
            for (int number = 0; number < 50; number++) {
                expect(200, "\"SecretData\":\"1\"", client.send(get(args, "/v1/a").build(), BodyHandlers.ofString()));
            }
            IntStream.range(0, 50)
                    .mapToObj(number -> client.sendAsync(get(args, "/v1/a").build(), BodyHandlers.ofString()))
                    .toList()
                    .forEach(reply -> expect(200, "\"SecretData\":\"1\"", reply.join()));
            expect(404, "Forbidden.ResourceNotFound", client.send(get(args, "/v1/missing").build(), BodyHandlers.ofString()));
            HttpRequest.Builder post = get(args, "/v1/a").POST(HttpRequest.BodyPublishers.ofString("x".repeat(100_000)));
            expect(405, "MethodNotAllowed", client.send(post.build(), BodyHandlers.ofString()));
            HttpRequest.Builder head = get(args, "/v1/a").method("HEAD", HttpRequest.BodyPublishers.noBody());
            expect(200, "", client.send(head.build(), BodyHandlers.ofString()));
            expect(200, "\"SecretData\":\"1\"", client.send(get(args, "/v1/a").build(), BodyHandlers.ofString()));
        }
        System.out.println("ok");
    }

    static HttpRequest.Builder get(String[] args, String path) {
        return HttpRequest.newBuilder(URI.create(args[0] + path)).header("X-KMS-Token", args[1]);
    }

    static void expect(int status, String part, HttpResponse<String> reply) {
        if (reply.statusCode() != status || !reply.body().contains(part) || reply.version() != HttpClient.Version.HTTP_1_1) {
            throw new AssertionError(reply + " " + reply.body());
        }
    }
}

"""ResponseType 1: as applications ask the AWS Secrets Manager Agent. Arguments: URL of the agent, token file."""

import base64
import json
import sys
import time

import requests

agent, token_file = sys.argv[1:]
with open(token_file, encoding="ascii") as file:
    HEADERS = {"X-Aws-Parameters-Secrets-Token": file.read().strip()}
session = requests.Session()
session.trust_env = False


def get(secret_id, headers=HEADERS, **parameters):
    parameters["secretId"] = secret_id
    return session.get(agent + "/secretsmanager/get", params=parameters, headers=headers, timeout=15)


reply = get("db")
assert reply.status_code == 200, reply.text
secret = reply.json()
assert set(secret) == {"Name", "VersionId", "SecretString", "VersionStages", "CreatedDate"}, secret
assert secret["Name"] == "db" and secret["VersionStages"] == ["AWSCURRENT"], secret
assert json.loads(secret["SecretString"]) == {"password": "new \"\u00fc\""}, secret
assert abs(float(secret["CreatedDate"]) - time.time()) < 3600 and isinstance(secret["CreatedDate"], str), secret
assert get("db", versionStage="AWSCURRENT").headers["X-Cache"] == "HIT"
previous = get("db", versionStage="AWSPREVIOUS").json()
assert previous["SecretString"] == "old" and previous["VersionStages"] == ["AWSPREVIOUS"], previous
assert get("db", versionId=previous["VersionId"]).json()["SecretString"] == "old"
assert get("db", refreshNow="true").headers["X-Cache"] == "REFRESH"
assert session.get(agent + "/v1/db", headers=HEADERS, timeout=15).json() == secret
binary = get("binary").json()
assert base64.b64decode(binary["SecretBinary"]) == b"\0\1\2" and "SecretString" not in binary, binary
arn = sys.stdin.read().strip()
assert get(arn).json()["ARN"] == arn


def error(reply):
    return reply.status_code, reply.headers["Content-Type"].split(";")[0], reply.text


# The gates speak plain text, KMS speaks JSON.
assert error(get("db", headers={})) == (403, "text/plain", "Bad Token")
assert error(get("db", headers={"X-Aws-Parameters-Secrets-Token": "wrong"})) == (403, "text/plain", "Bad Token")
assert error(get("db", headers={"X-KMS-Token": HEADERS["X-Aws-Parameters-Secrets-Token"]}))[0] == 403
assert error(get("db", headers={**HEADERS, "X-Forwarded-For": "1.2.3.4"})) == (400, "text/plain", "Forwarded")
assert error(session.post(agent + "/secretsmanager/get", headers=HEADERS, timeout=15)) == (405, "text/plain", "Not allowed")
assert error(session.get(agent + "/x", headers=HEADERS, timeout=15)) == (404, "text/plain", "Not found")
bare = session.get(agent + "/secretsmanager/get", headers=HEADERS, timeout=15)
assert error(bare) == (400, "text/plain", "missing parameter secretId")
assert error(get("")) == (400, "text/plain", "missing secret ID")
assert error(get("db", p="1")) == (400, "text/plain", "unknown parameter: p")
assert error(get("db", refreshNow="maybe")) == (400, "text/plain", "invalid refreshNow value")
assert session.get(agent + "/ping", timeout=15).text == "healthy"
reply = get("missing")
assert (reply.status_code, reply.headers["Content-Type"]) == (404, "application/json"), reply.text
assert set(reply.json()) == {"__type", "message"}, reply.text
assert reply.json()["__type"] == "Forbidden.ResourceNotFound", reply.text
print("ok")

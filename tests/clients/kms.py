"""ResponseType 0: a requests session and urllib. Arguments: URL of the agent, token file."""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request

import requests

agent, token_file = sys.argv[1:]
with open(token_file, encoding="ascii") as file:
    token = file.read().strip()

# A session keeps one connection for everything, errors included.
session = requests.Session()
session.trust_env = False
session.headers["X-KMS-Token"] = token
get = agent + "/secretsmanager/get"
for number in range(50):
    reply = session.get(get, params={"secretId": "a"}, timeout=15)
    assert reply.status_code == 200 and reply.json()["SecretData"] == "1", reply.text
    assert reply.headers["X-Cache"] == ("HIT" if number else "MISS"), reply.headers
    reply = session.get(get, params={"secretId": "missing"}, timeout=15)
    assert reply.status_code == 404 and reply.json()["Code"] == "Forbidden.ResourceNotFound", reply.text
    reply = session.get(agent + "/v1/a", headers={"X-KMS-Token": "wrong"}, timeout=15)
    assert (reply.status_code, reply.json()["Code"]) == (403, "InvalidToken"), reply.text
    assert session.head(agent + "/v1/a", timeout=15).headers["Content-Length"] != "0"
    assert session.get(agent + "/ping", timeout=15).text == "healthy"
assert session.get(get, params={"secretId": "team/k\u00e4se +1"}, timeout=15).json()["SecretData"] == "gr\u00fcn"
pools = session.adapters["http://"].poolmanager.pools
(pool,) = [pools[key] for key in pools.keys()]
assert (pool.num_connections, pool.num_requests) == (1, 251), (pool.num_connections, pool.num_requests)
# A body ends the connection; the session opens another one.
reply = session.post(agent + "/v1/a", data=b"x" * 100_000, timeout=15)
assert (reply.status_code, reply.headers["Allow"], reply.headers["Connection"]) == (405, "GET, HEAD", "close"), reply.headers
assert session.get(agent + "/v1/a", timeout=15).json()["SecretData"] == "1"
reply = session.get(agent + "/v1/a?refreshNow=yes", timeout=15).json()
assert reply["Message"] == "invalid refreshNow value: it must be true, false, 1 or 0", reply

# urllib says `Connection: close` each time.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(path):
    request = urllib.request.Request(agent + path, headers={"X-Vault-Token": token})
    try:
        with opener.open(request, timeout=15) as reply:
            assert reply.headers["Connection"] == "close"
            return json.load(reply)["SecretData"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["Code"]


assert fetch("/v1/a") == "1"
assert fetch("/v1/" + urllib.parse.quote("team/k\u00e4se +1")) == "gr\u00fcn"
assert fetch("/v1/missing") == (404, "Forbidden.ResourceNotFound")
print("ok")

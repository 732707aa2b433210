#!/usr/bin/env python3
"""Asks kms-agent for a secret and prints its value:  get_secret.py NAME

Python's standard library only. The token: KMS_TOKEN (the token itself, or file:///path), else the file
/var/run/kmstoken. The agent: KMS_AGENT, else http://localhost:2025.
"""

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request

# No proxy: it would learn both token and secret.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def token():
    """The token. Read it for each request: it may be rotated while a program runs."""
    value = os.environ.get("KMS_TOKEN", "file:///var/run/kmstoken")
    if value.startswith("file://"):
        with open(value[len("file://"):], encoding="ascii") as file:
            value = file.read()
    return value.strip()


def get_secret(name, refresh_now=False):
    """The secret's value, SecretData. `refresh_now` goes past the agent's cache."""
    query = {"secretId": name}
    if refresh_now:
        query["refreshNow"] = "true"
    agent = os.environ.get("KMS_AGENT", "http://localhost:2025")
    request = urllib.request.Request(
        agent + "/secretsmanager/get?" + urllib.parse.urlencode(query),
        headers={"X-KMS-Token": token()},
    )
    with OPENER.open(request, timeout=15) as reply:
        return json.load(reply)["SecretData"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: get_secret.py NAME", file=sys.stderr)
        sys.exit(2)
    try:
        print(get_secret(sys.argv[1]))
    except urllib.error.HTTPError as error:
        # The body says why: {"Code": .., "Message": .., "RequestId": ..}
        sys.exit(f"{error.code} {error.read().decode()}")
    except OSError as error:
        sys.exit(str(error))

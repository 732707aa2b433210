"""ResponseType 2: hvac, HashiCorp's KV versions 1 and 2. Arguments: URL of the agent, token file."""

import sys

import hvac
import hvac.exceptions
import requests

agent, token_file = sys.argv[1:]
with open(token_file, encoding="ascii") as file:
    token = file.read().strip()
session = requests.Session()
session.trust_env = False


def client(token):
    return hvac.Client(url=agent, token=token, session=session)


def raises(error, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except error as raised:
        assert type(raised) is error, repr(raised)
        return raised
    raise AssertionError(f"{error} expected")


vault = client(token)
db = {"user": "u", "password": "p\"\\\u00fc", "port": 3306, "nested": {"a": [1, None]}}

# Version 1: plain paths, and a mount point that is the id's beginning.
reply = vault.read("db")
assert reply["data"] == db, reply
assert 0 < reply["lease_duration"] <= 300 and reply["renewable"] is False, reply
assert vault.secrets.kv.v1.read_secret("db", mount_point="team")["data"] == {"value": "nested"}
assert vault.secrets.kv.v1.read_secret("b/c", mount_point="a")["data"] == {"value": "deep"}
assert vault.read("plain")["data"] == {"value": "line\n\"two\""}
assert vault.read("list")["data"] == {"value": "[1,2]"}
assert vault.read("broken")["data"] == {"value": "{\"a\":"}

# Version 2: the default mount point.
reply = vault.secrets.kv.v2.read_secret_version("db", raise_on_deleted_version=True)
assert reply["data"]["data"] == db, reply
metadata = reply["data"]["metadata"]
assert metadata["destroyed"] is False and metadata["deletion_time"] == "", metadata
assert metadata["created_time"].endswith("Z") and isinstance(metadata["version"], int), metadata
assert "ACSCurrent" in metadata["custom_metadata"]["version_stages"], metadata
reply = vault.secrets.kv.v2.read_secret("team/db", raise_on_deleted_version=False)
assert reply["data"]["data"] == {"value": "nested"}, reply

# hvac gives nothing for a read that is 404, and raises elsewhere.
assert vault.read("missing") is None
error = raises(hvac.exceptions.InvalidPath, vault.secrets.kv.v1.read_secret, "missing", mount_point="team")
assert "Forbidden.ResourceNotFound" in str(error), error
raises(hvac.exceptions.InvalidPath, vault.secrets.kv.v2.read_secret_version, "missing", raise_on_deleted_version=True)
# Refused by KMS, whatever status it has for that.
error = raises(hvac.exceptions.Forbidden, vault.read, "refused")
assert "Forbidden.NoPermission" in str(error), error
error = raises(hvac.exceptions.Forbidden, vault.read, "disabled")
assert "Rejected.Disabled" in str(error), error
# Refused by us.
stranger = client("wrong")
error = raises(hvac.exceptions.Forbidden, stranger.read, "db")
assert error.errors == ["the token in the request is wrong"], error.errors
raises(hvac.exceptions.Forbidden, stranger.secrets.kv.v2.read_secret_version, "db", raise_on_deleted_version=True)
error = raises(hvac.exceptions.InvalidRequest, vault.read, "a%ff")
assert error.errors == ["the secret ID in the path is badly encoded"], error.errors
error = raises(hvac.exceptions.UnexpectedError, vault.write, "db", a="b")
assert error.errors == ["the agent answers GET and HEAD only"], error.errors
# KMS down.
error = raises(hvac.exceptions.BadGateway, vault.read, "unusable")
assert error.errors[0].startswith("UpstreamInvalidResponse: "), error.errors
print("ok")

"""Asks the emulator for a secret through Alibaba Cloud's official Python SDK.

Run by tests/python_sdk.rs, which passes what it needs in the environment. Prints one line a step.
"""

import json
import os

from alibabacloud_credentials.client import Client as CredentialClient
from alibabacloud_credentials.provider import EcsRamRoleCredentialsProvider
from alibabacloud_kms20160120.client import Client
from alibabacloud_kms20160120 import models
from alibabacloud_tea_openapi import models as openapi

ENV = {name: os.environ["EMULATOR_" + name] for name in (
    "ENDPOINT", "METADATA", "CA", "SECRET", "VALUE", "AK", "STS")}


def client(**credentials):
    with open(ENV["CA"], encoding="ascii") as pem:
        assert "BEGIN CERTIFICATE" in pem.read()
    return Client(openapi.Config(endpoint=ENV["ENDPOINT"], ca=ENV["CA"], **credentials))


def get(kms, name):
    return kms.get_secret_value(models.GetSecretValueRequest(secret_name=name)).body


def ram_role_provider():
    provider = EcsRamRoleCredentialsProvider(async_update_enabled=False)
    # The address is a private constant of the provider; there is no option for it.
    host = "_EcsRamRoleCredentialsProvider__metadata_service_host"
    assert getattr(provider, host) == "100.100.100.200"
    setattr(provider, host, ENV["METADATA"])
    return provider


def main():
    key_id, key_secret = json.loads(ENV["AK"])
    sts_id, sts_secret, sts_token = json.loads(ENV["STS"])
    clients = {
        "access key": client(access_key_id=key_id, access_key_secret=key_secret),
        "STS": client(access_key_id=sts_id, access_key_secret=sts_secret, security_token=sts_token),
        "RAM role": client(credential=CredentialClient(provider=ram_role_provider())),
    }
    for how, kms in clients.items():
        body = get(kms, ENV["SECRET"])
        assert body.secret_name == ENV["SECRET"], body
        assert body.secret_data == ENV["VALUE"], body
        assert body.version_stages.version_stage == ["ACSCurrent"], body
        assert body.secret_type == "Generic" and body.secret_data_type == "text", body
        print(f"ok: secret with {how}")

    kms = clients["RAM role"]
    try:
        get(kms, "no-such-secret")
    except Exception as error:  # the SDK's own type has moved between its releases
        seen = getattr(error, "code", None), getattr(error, "data", None) or {}
        assert seen[0] == "Forbidden.ResourceNotFound", seen
        status = seen[1].get("statusCode") or getattr(error, "status_code", None)
        assert status == 404, seen
        print("ok: the SDK's error for a missing secret")
    else:
        raise AssertionError("a missing secret was found")

    life(kms)


def life(kms):
    """Creation, rotation, deletion and restoration of an ECS secret, as the SDK words them."""
    name = "acs/ecs/sdk"
    created = kms.create_secret(models.CreateSecretRequest(
        secret_name=name, version_id="v1", secret_type="ECS",
        secret_data=json.dumps({"UserName": "root", "Password": "first"}),
        extended_config={"SecretSubType": "Password", "RegionId": "cn-hangzhou", "InstanceId": "i-1"},
        enable_automatic_rotation=True, rotation_interval="7d")).body
    assert created.rotation_interval == "604800s" and created.version_id == "v1", created
    rotated = kms.rotate_secret(models.RotateSecretRequest(secret_name=name, version_id="v2")).body
    assert rotated.version_id == "v2" and rotated.arn.endswith(":secret/" + name), rotated
    value = json.loads(get(kms, name).secret_data)
    assert value["UserName"] == "root" and len(value["Password"]) == 32, "not a generated password"
    versions = kms.list_secret_version_ids(models.ListSecretVersionIdsRequest(secret_name=name)).body
    stages = {v.version_id: v.version_stages.version_stage for v in versions.version_ids.version_id}
    assert stages == {"v1": ["ACSPrevious"], "v2": ["ACSCurrent"]}, stages
    kms.delete_secret(models.DeleteSecretRequest(secret_name=name, recovery_window_in_days="7"))
    described = kms.describe_secret(models.DescribeSecretRequest(secret_name=name)).body
    assert described.planned_delete_time and described.next_rotation_date, described
    kms.restore_secret(models.RestoreSecretRequest(secret_name=name))
    assert get(kms, name).version_id == "v2"
    print("ok: the life of an ECS secret")


main()

"""The official credentials provider, as any SDK uses it on an ECS instance: hard-wired to 100.100.100.200.

Argument: `hardened` to forbid plain GETs. Prints the credentials of its ECS provider, then those of its default
chain, each as JSON in a line.
"""

import json
import sys

from alibabacloud_credentials.client import Client
from alibabacloud_credentials.provider import EcsRamRoleCredentialsProvider


def show(credentials):
    print(json.dumps([
        credentials.get_access_key_id(),
        credentials.get_access_key_secret(),
        credentials.get_security_token(),
    ]))


provider = EcsRamRoleCredentialsProvider(disable_imds_v1=sys.argv[1:] == ["hardened"], async_update_enabled=False)
show(provider.get_credentials())
show(Client().get_credential())

#!/bin/sh
# Cloud Assistant command: says whether kms-agent runs and whether it can get secrets. Exit code 0: both.
set -u

# As in the installer's folder, or wherever a package's link leads.
agent=/usr/local/alibabacloudkmsagent/bin/kms-agent
if [ ! -x "$agent" ]; then
    echo 'Not installed'
    exit 5
fi
"$agent" --version
"$agent" status || exit $?
"$agent" check

#!/bin/sh
# Cloud Assistant command: removes kms-agent. What stands in double braces is replaced by Cloud Assistant.
set -eu

options='{{options}}'
case $options in '{''{'*) options='' ;; esac

uninstall=/usr/local/alibabacloudkmsagent/uninstall.sh
if [ -f "$uninstall" ]; then
    set -f
    # shellcheck disable=SC2086 # several options
    sh "$uninstall" $options
elif [ -e /usr/local/alibabacloudkmsagent/bin/kms-agent ]; then
    echo 'kms-agent: it was installed as a package: remove that' >&2
    exit 1
else
    echo 'kms-agent: not installed'
fi

#!/bin/sh
# Removes kms-agent as install.sh put it there. May be run again. POSIX sh, coreutils and util-linux.
set -eu

home=/usr/local/alibabacloudkmsagent
unit_dir=/etc/systemd/system
user=kmsagent
token_group=kmstoken

usage() {
    cat <<END
Usage: uninstall.sh [--purge] [--root DIR]

Stops and removes kms-agent and its token. Keeps config.toml, ca.pem and logs/ in
$home, and the accounts, for a next installation.

  --purge    remove those, too: nothing stays
  --root     remove the files that install.sh staged below this folder, and do nothing else
END
}

say() { printf '%s\n' "kms-agent: $*"; }

fail() {
    say "$@" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

purge=${KMS_AGENT_PURGE:-}
root=${KMS_AGENT_ROOT:-}
while [ $# -gt 0 ]; do
    case $1 in
        --purge) purge=1 ;;
        --root=*) root=${1#*=} ;;
        --root)
            [ $# -gt 1 ] || { usage >&2; exit 2; }
            root=$2
            shift
            ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$root" ]; then
    root=$(cd "$root" && pwd) || exit 1
else
    [ "$(id -u)" = 0 ] || fail "only root can remove it"
    for owner in "dpkg-query --search" "rpm --query --file"; do
        # shellcheck disable=SC2086 # a command and its options
        if have "${owner%% *}" && $owner "$home/bin/kms-agent" >/dev/null 2>&1; then
            fail "it was installed as a package (${owner%% *} knows it): remove that"
        fi
    done
fi

unit=$root$unit_dir/kms-agent.service
if [ -z "$root" ] && have systemctl && [ -f "$unit" ]; then
    [ ! -d /run/systemd/system ] || systemctl stop kms-agent
    systemctl disable kms-agent >/dev/null 2>&1 || true
fi
rm -f "$unit" "$root$unit_dir/kms-agent.service.d/log-path.conf"
# Somebody else's drop-ins keep their folder, unless nothing is to stay.
[ -z "$purge" ] || rm -rf "$unit.d"
[ ! -d "$unit.d" ] || rmdir "$unit.d" 2>/dev/null || say "kept: $unit.d"
if [ -z "$root" ] && [ -d /run/systemd/system ] && have systemctl; then
    systemctl daemon-reload
    systemctl reset-failed kms-agent 2>/dev/null || true
fi

[ -n "$root" ] || rm -f /var/run/kmstoken
link=$root/usr/local/bin/kms-agent
[ "$(readlink "$link" 2>/dev/null)" != "$home/bin/kms-agent" ] || rm -f "$link"
rm -f "$root/usr/local/share/man/man8/kms-agent.8"
cd /
if [ -n "$purge" ]; then
    rm -rf "$root${home:?}"
else
    rm -rf "$root${home:?}/bin"
    rm -f "$root$home/config.toml.sample" "$root$home/uninstall.sh"
    # Empty: nothing of it is worth keeping.
    rmdir "$root$home/logs" "$root$home" 2>/dev/null || true
    [ ! -d "$root$home" ] || say "kept: $root$home (--purge removes it)"
fi
if [ -n "$purge" ] && [ -z "$root" ]; then
    ! getent passwd "$user" >/dev/null || userdel "$user"
    for group in "$user" "$token_group"; do
        ! getent group "$group" >/dev/null || groupdel "$group"
    done
fi
say "removed"

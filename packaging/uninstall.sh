#!/bin/sh
# Removes what install.sh has put on this host. It may be run again, and needs a POSIX sh, coreutils and util-linux.
set -eu
# Whatever the caller has set: 'cd' prints nothing, and root's tools are in PATH.
unset CDPATH
export LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin"

home=/usr/local/alibabacloudkmsagent
unit_dir=/etc/systemd/system
user=kmsagent
token_group=kmstoken

usage() {
    cat <<END
Usage: uninstall.sh [--purge] [--root DIR]

Stops and removes kms-agent and its token. It keeps config.toml, ca.pem and logs/ in
$home, and the accounts, for the next installation.

  --purge       remove these as well; only a LogPath elsewhere is kept
  --root DIR    only remove the files that install.sh has put below this folder

The options may be given as variables instead: KMS_AGENT_PURGE=1, KMS_AGENT_ROOT=DIR.
END
}

say() { printf '%s\n' "kms-agent: $*"; }

fail() {
    say "$@" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

case ${KMS_AGENT_PURGE:-} in
    '' | 0 | no | false) purge='' ;;
    1 | yes | true) purge=1 ;;
    *) usage >&2; exit 2 ;;
esac
root=${KMS_AGENT_ROOT:-}
while [ $# -gt 0 ]; do
    case $1 in
        --purge) purge=1 ;;
        # An empty value does not count as none: '--root "$unset"' must not remove what is installed on this host.
        --root=?*) root=${1#*=} ;;
        --root)
            [ -n "${2:-}" ] || { usage >&2; exit 2; }
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
    [ "$(id -u)" = 0 ] || fail "only root can remove the agent"
    for owner in "dpkg-query --search" "rpm --query --file"; do
        # shellcheck disable=SC2086 # a command and its options
        if have "${owner%% *}" && $owner "$home/bin/kms-agent" >/dev/null 2>&1; then
            fail "the agent was installed as a package (${owner%% *} knows it); remove that package"
        fi
    done
    if have flock && [ -d "$unit_dir" ]; then
        exec 9<"$unit_dir"
        flock --nonblock 9 || fail 'an installation is running; try again when it has ended'
    fi
fi

unit=$root$unit_dir/kms-agent.service
if [ -z "$root" ] && have systemctl && [ -f "$unit" ]; then
    [ ! -d /run/systemd/system ] || systemctl stop kms-agent
    systemctl disable kms-agent >/dev/null 2>&1 || true
fi
[ -z "$purge" ] || [ ! -f "$unit.d/log-path.conf" ] || while IFS= read -r line; do
    case $line in ReadWriteDirectories=*) say "kept the logs in ${line#*=}" ;; esac
done <"$unit.d/log-path.conf"
rm -f "$unit" "$unit.d/log-path.conf" "$unit.d/no-user-namespaces.conf"
# Other drop-ins keep their folder, unless everything is to be removed.
[ -z "$purge" ] || rm -rf "$unit.d"
[ ! -d "$unit.d" ] || rmdir "$unit.d" 2>/dev/null || say "kept $unit.d, which has other files"
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
    # The files go by name first, since the folder may be a link to another file system.
    for name in bin logs config.toml config.toml.sample ca.pem uninstall.sh; do
        rm -rf "$root${home:?}/$name"
    done
    rm -rf "$root${home:?}"
else
    rm -rf "$root${home:?}/bin"
    rm -f "$root$home/config.toml.sample" "$root$home/uninstall.sh"
    # Empty folders are not worth keeping.
    rmdir "$root$home/logs" "$root$home" 2>/dev/null || true
    [ ! -d "$root$home" ] || say "kept $root$home (--purge removes it)"
fi
if [ -n "$purge" ] && [ -z "$root" ]; then
    ! getent passwd "$user" >/dev/null || userdel "$user"
    for group in "$user" "$token_group"; do
        # The group may be the primary group of another user.
        ! getent group "$group" >/dev/null || groupdel "$group" || say "kept the group $group, which is still in use"
    done
fi
say "the agent is removed"

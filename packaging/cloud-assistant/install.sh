#!/bin/sh
# Cloud Assistant command: fetches the bundle of kms-agent, verifies it, installs or upgrades.
# What stands in double braces is replaced by Cloud Assistant; README.md has the parameters.
set -eu

url='{{url}}'
sums='{{sha256}}'
options='{{options}}'

fail() {
    printf 'kms-agent: %s\n' "$*" >&2
    exit 1
}

# A parameter that was left out stays as it is written here. (In two parts, or it would be replaced in this line.)
case $options in '{''{'*) options='' ;; esac
case $url in '{''{'* | '') fail 'the parameter url is missing' ;; esac
case $sums in '{''{'* | '') fail 'the parameter sha256 is missing' ;; esac

arch=$(uname -m)
case $url in *-ARCH-*) url=${url%%-ARCH-*}-$arch-${url#*-ARCH-} ;; esac

# Not below /tmp: that may be mounted noexec, and the installer asks the binary for its version.
folder=$(mktemp -d /usr/local/.kms-agent.XXXXXX)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cd "$folder"

if command -v curl >/dev/null 2>&1; then
    curl --fail --silent --show-error --location --retry 3 --retry-max-time 240 --connect-timeout 10 --max-time 240 \
        --output bundle "$url"
elif command -v wget >/dev/null 2>&1; then
    wget --quiet --tries=3 --timeout=60 --output-document=bundle "$url"
else
    fail 'neither curl nor wget is installed'
fi || fail "cannot fetch $url"

# One sum an architecture may be given; the file's has to be among them.
sum=$(sha256sum bundle)
sum=${sum%% *}
case " $(printf %s "$sums" | tr ,A-F ' a-f') " in
    *" $sum "*) ;;
    *) fail "$url has the sha256 $sum, which is not what was given; nothing was installed" ;;
esac

mkdir unpacked
tar --extract --gzip --no-same-owner --file bundle --directory unpacked
set -- unpacked/*/install.sh
[ -f "$1" ] || fail "$url is no bundle: there is no install.sh in it"
set -f
# shellcheck disable=SC2086 # several options
sh "$1" $options

#!/bin/sh
# MySQL as a server for tests, into $DELTA_JARS/mysql-<version>: the package of Debian's unstable with everything that
# it needs, unpacked, so that its programs run with their own C library on an older system, too. It needs apt and
# dpkg-deb, but no root, and leaves the system's packages alone. Quick when it is there.
#
# apt resolves what belongs together, checks the index's signature by Debian's keys and each file's SHA256 by the index.
set -eu

jars=${DELTA_JARS:-.cache/jars}
mirror=${DELTA_DEBIAN:-$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 'debian/*$')} # as the system's own
for found in "$jars"/mysql-[0-9]*/usr/sbin/mysqld; do
    [ -x "$found" ] && exit 0
done

mkdir -p "$jars"
work=$(mktemp -d "$jars/mysql.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/unpacked" "$work/empty"
: >"$work/status" # nothing is installed, so everything belongs to what is fetched
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$work/sources.list"

apt() {
    apt-get -q -y -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" -o Dir::Cache="$work" \
        -o Dir::Cache::archives="$work/archives" -o Dir::Etc::sourcelist="$work/sources.list" \
        -o Dir::Etc::sourceparts="$work/empty" -o Dir::Etc::preferencesparts="$work/empty" \
        -o Dir::Etc::preferences=/dev/null -o pkgCacheGen::Essential=none -o APT::Sandbox::User= \
        -o Debug::NoLocking=1 -o Acquire::Languages=none "$@"
}

apt update
apt install --download-only --no-install-recommends mysql-server-core
for package in "$work"/archives/*.deb; do
    dpkg-deb -x "$package" "$work/unpacked"
done
version=$(dpkg-deb -f "$work"/archives/mysql-server-core_*.deb Version)
chmod 755 "$work/unpacked"
mv "$work/unpacked" "$jars/mysql-$version"
echo "$jars/mysql-$version"

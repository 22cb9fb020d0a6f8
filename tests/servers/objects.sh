#!/bin/sh
# Stores of objects for `make test-elsewhere`, each where it is not yet (once, some 15 minutes of CPU time):
# one that speaks S3, Versity's gateway over a folder; one that speaks as Google's, fake-gcs-server; and Azurite, Azure's.
#   usage: objects.sh FOLDER    (bin/ and azurite/ are put there)
# Go holds each module against the public log of checksums, npm each package against azurite/package-lock.json.
set -eu

versitygw=v1.8.0
fake_gcs_server=v1.56.1
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
folder=$1

# need PROGRAM PACKAGE: Debian's package, where the program is not.
need() {
    ! command -v "$1" >/dev/null || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        apt-get install -q -y --no-install-recommends "$2" ca-certificates
    else
        echo "Please install (Debian's package name): $2" >&2
        exit 1
    fi
}

# built NAME VERSION MODULE
built() {
    [ ! -x "$folder/bin/$1-$2" ] || return 0
    need go golang-go
    GOBIN="$folder/bin" CGO_ENABLED=0 go install "$3@$2"
    mv "$folder/bin/$1" "$folder/bin/$1-$2"
}

PATH="$PATH:/usr/local/go/bin"
mkdir -p "$folder/bin" "$folder/azurite"
built versitygw "$versitygw" github.com/versity/versitygw/cmd/versitygw
built fake-gcs-server "$fake_gcs_server" github.com/fsouza/fake-gcs-server
if ! cmp -s "$here/azurite/package-lock.json" "$folder/azurite/node_modules/.installed"; then
    need npm npm
    cp "$here/azurite/package.json" "$here/azurite/package-lock.json" "$folder/azurite"
    npm --prefix "$folder/azurite" ci --ignore-scripts --no-audit --no-fund
    cp "$here/azurite/package-lock.json" "$folder/azurite/node_modules/.installed"
fi

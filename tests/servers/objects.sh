#!/bin/sh
# A store of objects that speaks S3, for `make test-elsewhere`: Versity's gateway over a folder, built from its source.
#   usage: objects.sh FOLDER    (where versitygw is put; once, some 10 minutes of CPU time)
# Go holds each module against the public log of checksums.
set -eu

version=v1.8.0
folder=$1
[ ! -x "$folder/versitygw-$version" ] || exit 0

PATH="$PATH:/usr/local/go/bin"
if ! command -v go >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        apt-get install -q -y --no-install-recommends golang-go ca-certificates
    else
        echo "Please install Go (Debian's package name): golang-go" >&2
        exit 1
    fi
fi
mkdir -p "$folder"
GOBIN="$folder" CGO_ENABLED=0 go install "github.com/versity/versitygw/cmd/versitygw@$version"
mv "$folder/versitygw" "$folder/versitygw-$version"

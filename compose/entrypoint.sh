#!/bin/sh
# Runs deltactl on the pipelines of this image, whose root file system may be read-only. What a pipeline keeps in its
# folder (state, locks, logs) belongs on the volume, so there each has a folder with links to its files.
set -eu

for source in /app/pipelines/*/; do
    home="$DELTA_PIPELINES/$(basename "$source")"
    mkdir -p "$home"
    find "$home" -maxdepth 1 -type l -delete # of an older image, when the volume was kept
    for file in "$source"*; do
        ln -s "$file" "$home/"
    done
done
exec deltactl "$@"

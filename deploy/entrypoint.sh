#!/bin/sh
# Serves every folder under /models by its name; arguments are options of `paperzoo serve`.
set -eu
models="${PAPERZOO_MODELS:-/models}"
for folder in "$models"/*/; do
    [ -e "$folder/config.json" ] || continue
    name="$(basename "$folder")"
    set -- "$name=${folder%/}" "$@"
done
exec paperzoo serve "$@" --host 0.0.0.0 --port 8000

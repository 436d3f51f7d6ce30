#!/bin/sh
# Install the servers that benchmarks.frontend compares with, each into a virtual environment of its own: peers.sh FOLDER
# What is there already is left alone.
set -eu
folder=$1
mkdir -p "$folder"

environment() {  # name: a fresh environment, if it is missing
    [ -e "$folder/$1/installed" ] && return 1
    python3 -m venv "$folder/$1"
}

if environment dynamo; then
    # With its dependencies it does not install: one of them is a placeholder that refuses to.
    "$folder/dynamo/bin/pip" install -q --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
    "$folder/dynamo/bin/pip" install -q aiohttp certifi msgspec prometheus-client pyzmq 'redis<9' tqdm \
        'transformers>=4.56' typing-extensions 'zstandard<1' 'kubernetes<33' 'pydantic>=2.10.6,<=2.13.5' uvloop
    touch "$folder/dynamo/installed"
fi
if environment smg; then
    "$folder/smg/bin/pip" install -q --no-deps smg==1.13 setproctitle
    touch "$folder/smg/installed"
fi

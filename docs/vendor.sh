#!/bin/sh
# Fetch MathJax and its font, so that the site needs no network; npm checks them against package-lock.json.
set -e
cd "$(dirname "$0")"
command -v npm > /dev/null || { echo "npm is not installed: the site's mathematics needs it once (Node.js, https://nodejs.org)" >&2; exit 1; }
wanted="$(cksum < package-lock.json)"
[ "$wanted" = "$(cat node_modules/.vendored 2> /dev/null)" ] && exit 0
npm ci --ignore-scripts --no-audit --no-fund --silent
echo "$wanted" > node_modules/.vendored

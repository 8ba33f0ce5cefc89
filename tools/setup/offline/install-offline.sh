#!/usr/bin/env bash
# install-offline.sh [VENV]: install what lies beside this file into VENV (./.venv unless given), without any index.
# PYTHON names the interpreter that the environment is made with. The environment sees the packages of that Python,
# where the list of what the machine has (manifest.json, of_the_machine) names any.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:-.venv}
wanted=$(sed -n 's/^  "python": "\(.*\)",$/\1/p' "$here/manifest.json")
python=${PYTHON:-python$wanted}

fail() { echo "install-offline: $1" >&2; exit 2; }

[ -n "$wanted" ] || fail "$here/manifest.json: names no Python. Copy the folder again."
[ ! -x "$venv/bin/python" ] || python=$venv/bin/python
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  fail "$python does not run. Set PYTHON to a Python $wanted."
[ "$found" = "$wanted" ] || fail "$python is Python $found, and these wheels are for $wanted. Set PYTHON, or name another folder for the environment."
if [ ! -x "$venv/bin/python" ]; then
  shared=()
  grep -q '^  "of_the_machine": {}' "$here/manifest.json" || shared=(--system-site-packages)
  "$python" -m venv ${shared[@]+"${shared[@]}"} "$venv" ||
    fail "$python makes no environment (on Debian: the package python$wanted-venv). Mend that, or give one that exists."
fi

# Nothing but this folder: no index, no settings of pip, no constraints from outside.
for name in $(env | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p'); do unset "$name"; done
PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --no-index --find-links "$here/wheels" --no-deps --require-hashes --requirement "$here/requirements.txt" ||
  fail "pip failed; its messages above name the package. A hash that differs means a damaged copy: copy the folder again."
exec "$venv/bin/python" "$here/check_offline.py" "$here"

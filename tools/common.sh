# shellcheck shell=bash
# Functions for the scripts of this folder: paths, messages, and the search for Python.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The Python versions that the pinned packages support (setup.cfg: python_requires).
readonly python_range='(3, 11) <= sys.version_info[:2] <= (3, 12)'
readonly python_words='Python 3.11 or 3.12'

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
  say "$*"
  exit 1
}

# Print the folder of the virtual environment. A relative LATENTPLAN_VENV is relative to the current
# folder. The default is .venv beside the package.
venv_folder() {
  local folder=${LATENTPLAN_VENV:-$root/.venv}
  case $folder in
    /*) printf '%s\n' "$folder" ;;
    *) printf '%s/%s\n' "$PWD" "$folder" ;;
  esac
}

# Print the interpreters to try, in order of preference.
python_candidates() {
  if [[ -n ${LATENTPLAN_PYTHON:-} ]]; then
    printf '%s\n' "$LATENTPLAN_PYTHON"
  else
    printf '%s\n' python3 python3.12 python3.11 python
  fi
}

# Print the first usable interpreter, or return 1 if there is none. With "venv", it must also be
# able to create virtual environments (Debian has a separate package for that).
find_python() {
  local candidate modules=sys
  [[ ${1:-} == venv ]] && modules='sys, venv, ensurepip'
  for candidate in $(python_candidates); do
    if "$candidate" -c "import $modules; sys.exit(not $python_range)" >/dev/null 2>&1; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return 0
    fi
  done
  return 1
}

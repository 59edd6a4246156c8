# shellcheck shell=bash
# What the launch scripts share: messages, quoting, and doing or only printing. Bash 4.4 or newer.

DRY_RUN=${DRY_RUN:-0}

fail() {  # fail WHAT: prints it and the way to the help
  echo "error: $1" >&2
  echo "see $0 --help, or launch/README.md" >&2
  exit 2
}

show() {  # show COMMAND…: one line that a shell would read back
  local word
  printf '$'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
  done
  printf '\n'
}

run() {  # run COMMAND…: prints it, and does it unless --dry-run
  show "$@"
  [[ $DRY_RUN == 1 ]] || "$@"
}

need() {  # need PROGRAM HINT: it must be installed, unless --dry-run
  [[ $DRY_RUN == 1 ]] || command -v "$1" > /dev/null || fail "$1: not found, expected it on PATH; $2"
}

required() {  # required --flag "$value" MEANING
  [[ -n $2 ]] || fail "$1: got nothing, expected $3"
}

whole() {  # whole --flag "$value": a number of 1 or more
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1: got '$2', expected a whole number of 1 or more"
}

help() {  # help FILE: the comment at its top
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

train_arguments() {  # train_arguments ARGUMENTS…: what training cannot do without
  local joined=" $*"
  [[ $joined == *" --config="* ]] || fail "training arguments: got '$*', expected --config=FILE after --"
  [[ $joined == *" --workdir="* ]] || fail "training arguments: got '$*', expected --workdir=FOLDER after --"
}

quoted() {  # quoted ARGUMENTS…: one string for a shell elsewhere
  local line
  line=$(show "$@")
  printf '%s' "${line:2}"
}

evaluate_arguments() {  # evaluate_arguments ARGUMENTS…: what a sharded evaluation cannot do without, and what is the script's
  local joined=" $*"
  [[ $joined == *" --policy="* ]] || fail "evaluation arguments: got '$*', expected --policy=FOLDER after --"
  [[ $joined == *" --suite="* ]] || fail "evaluation arguments: got '$*', expected --suite=NAMES after --"
  [[ $joined != *" --shard"* ]] || fail "evaluation arguments: got --shard, expected none: the script gives each its own"
  [[ $joined != *" --out"* ]] || fail "evaluation arguments: got --out, expected it before --"
}

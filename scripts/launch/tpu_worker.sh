#!/bin/sh
# What scripts/tpu_vm.py has each TPU worker do, in the copy of the code that it put there.
#
#   sh scripts/launch/tpu_worker.sh setup EXTRA ... | start ID COMMAND ... | probe SLICE | logs SLICE LINES | stop SECONDS
#
# gcloud repeats a command whose connection broke, so each does no harm when it comes twice.
# A run is alive for as long as it holds the lock: no process number to mistake for another's, not even after a reboot.
set -eu
cd "$(dirname "$0")/../.."
run=../bigjax_run
mkdir -p $run
worker=$(hostname | sed 's/.*-w-/w/') # t1v-n-0123abcd-w-3 is worker 3

fail() {
  echo "$2" >&2
  exit "$1"
}

running() { ! flock -n $run/lock true; }

# The images' Python is 3.10, too old: bootstrap.sh ends with 2 then, and finds the one that uv installs.
setup() {
  sh scripts/bootstrap.sh "$@" && return
  [ $? = 2 ] || exit 1
  python3 -m pip install -q --user uv || python3 -m pip install -q --user --break-system-packages uv
  python3 -m uv python install 3.12
  sh scripts/bootstrap.sh "$@"
}

start() {
  id=$1
  shift
  if running; then
    [ "$(cat $run/id)" = "$id" ] || fail 3 "another run goes on here: stop it first"
    echo "it is running already"
    return
  fi
  [ -x .venv/bin/bigjax ] || fail 4 "nothing is installed here: setup first"
  rm -f $run/pid $run/exit $run/stopped
  echo "$id" >$run/id
  echo "--- $(date -u +%FT%TZ) $*" >>$run/log
  nohup setsid flock -n $run/lock sh -c '
    "$@" & echo $! >../bigjax_run/pid; wait $! && code=0 || code=$?; echo $code >../bigjax_run/exit
  ' job "$@" >>$run/log 2>&1 </dev/null &
  tries=0
  until [ -s $run/pid ]; do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || fail 1 "it did not start"
    sleep 0.1
  done
}

probe() {
  if running; then
    doing=running
  elif [ -e $run/stopped ]; then
    doing=stopped
  elif [ -e $run/exit ]; then
    doing="ended $(cat $run/exit)"
  elif [ -e $run/id ]; then
    doing=lost # started, neither alive nor ended: the VM was started anew
  else
    doing=none
  fi
  echo "bigjax-worker: $1$worker: $doing"
}

logs() {
  touch $run/log
  tail -n "$2" ${3:-} $run/log | sed -u "s/^/$1$worker: /"
}

stop() {
  if ! running; then
    echo "nothing is running"
    return
  fi
  touch $run/stopped
  kill -TERM "$(cat $run/pid)"
  flock -w "$1" $run/lock true || fail 1 "it has not ended after $1 s"
}

"$@"

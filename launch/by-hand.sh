#!/bin/bash
# A run on machines that ssh reaches, one process on each, the first of them the coordinator:
#
#   HOSTS="10.0.0.1 10.0.0.2" launch/by-hand.sh RECIPE key=value ...
#   HOSTS="10.0.0.1 10.0.0.2" COMMAND=rl PLACE=luthier launch/by-hand.sh RECIPE key=value ...
#
# PLACE is the folder on each machine that the command is given in (default: the same as here). Ctrl-C, or SIGTERM to
# this script, stops the run on all of them: it saves, and the same command goes on.

set -uo pipefail

read -ra hosts <<<"${HOSTS:?name the machines: HOSTS=\"10.0.0.1 10.0.0.2\"}"
printf -v arguments ' %q' "$@"

printf -v there '%q' "${PLACE:-$PWD}"
address=${hosts[0]}:${PORT:-8476}
mine=.luthier-${PORT:-8476}.pid # of process 0, in its folder

stop() { # one process is enough: all agree on the step after which they save
  ssh -n "${hosts[0]}" "kill -TERM \$(cat $there/$mine)"
}
trap stop INT TERM

processes=()
for number in "${!hosts[@]}"; do
  begin="cd $there"
  [[ $number -gt 0 ]] || begin+=" && echo \$\$ >$mine"
  ssh -n "${hosts[$number]}" "$begin && exec luthier ${COMMAND:-sft}$arguments \
coordinator_address=$address num_processes=${#hosts[@]} process_id=$number" &
  processes+=($!)
done

code=0
for process in "${processes[@]}"; do
  wait "$process"
  each=$?
  while kill -0 "$process" 2>/dev/null; do # a signal ended the wait, not the process
    wait "$process"
    each=$?
  done
  [[ $each -eq 0 ]] || code=$each
done
exit "$code"

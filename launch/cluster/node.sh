#!/usr/bin/env bash
# Starts this node's ranks of a program, passes signals on to them, and ends them all when one has failed.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=first-node launch/cluster/node.sh launch/train.py --config my.yaml --run.resume auto
#
# Why not torchrun or DeepSpeed's launcher: both give ranks 30 seconds after SIGTERM before they kill them, which is too short for
# the rest of a step and a checkpoint, and know nothing of SIGUSR1. How long ranks have is for the scheduler to say.
#
# Variables (default):
#   NODES (1)              nodes of the run
#   NODE_RANK (0)          this node's place among them, 0 .. NODES-1
#   RANKS_PER_NODE         ranks on each node, the same everywhere (number of GPUs that nvidia-smi lists, or 1)
#   MASTER_ADDR            host of node 0, as the others reach it (127.0.0.1 for a single node)
#   MASTER_PORT (29500)    a port that is free there
#   PYTHON                 the Python that has katds (.venv/bin/python if there is one, or python3)
#   OMP_NUM_THREADS        threads of a rank on the CPU (the cores that it may use, divided by the node's ranks)
#   SIGNALS_FROM_STDIN ()  not empty: names of signals are read from standard input, whose end means TERM
#   PATIENCE_SECONDS (15)  from the first rank's failure to the end of the others; a rank that knows the cause ends some seconds after
#                          those that only miss it
#   CODE_FILE ()           not empty: the exit code is written there, for a scheduler that tells one of all nodes' codes only
#
# Exit code: 0 if all ranks end so; 75 if a signal ended the run, which the same command goes on with; 69 if nothing was wrong but that
# ranks of other nodes are gone; else that of the first rank here to fail in another way, which is the cause.
set -euo pipefail

NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_PORT=${MASTER_PORT:-29500}
PATIENCE_SECONDS=${PATIENCE_SECONDS:-15}
listener=
# shellcheck disable=SC2317,SC2329  # the trap does
leave() {
	[[ -z $listener ]] || kill "$listener" || true
	[[ -z ${CODE_FILE:-} ]] || echo "$1" >"$CODE_FILE" || true
} 2>/dev/null
trap 'leave $?' EXIT

ranks=()
heard=
pass_on() {
	# A second Ctrl-C does not wait for the end of the step.
	[[ $1 != KILL && $1 == "$heard" && ${2:-} == again ]] && set -- KILL
	heard=$1
	kill -s "$1" "${ranks[@]}" 2>/dev/null || true
}
# Set before the ranks are there: a signal in between would end this script and leave them behind. Ranks in the background ignore
# Ctrl-C, so they get SIGTERM for it.
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap 'pass_on TERM again' INT

if [[ -z ${RANKS_PER_NODE:-} ]]; then
	gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
	RANKS_PER_NODE=$((gpus > 0 ? gpus : 1))
fi
if [[ -z ${PYTHON:-} ]]; then
	PYTHON=python3
	[[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
for name in NODES RANKS_PER_NODE; do
	[[ ${!name} =~ ^[1-9][0-9]*$ ]] || { echo "error: $name is '${!name}'. Give a whole number of at least 1." >&2; exit 2; }
done
[[ $PATIENCE_SECONDS =~ ^[0-9]+$ ]] || { echo "error: PATIENCE_SECONDS is '$PATIENCE_SECONDS'. Give a whole number." >&2; exit 2; }
if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= NODES)); then
	echo "error: NODE_RANK is '$NODE_RANK', with NODES=$NODES. Give each node its own, from 0." >&2
	exit 2
fi
if [[ -z ${MASTER_ADDR:-} ]]; then
	((NODES == 1)) || { echo "error: MASTER_ADDR is not set. Give the host name of node 0." >&2; exit 2; }
	MASTER_ADDR=127.0.0.1
fi
(($# > 0)) || { echo "error: there is no program. Write node.sh launch/train.py --config RECIPE.yaml." >&2; exit 2; }

if [[ -n ${SIGNALS_FROM_STDIN:-} ]]; then
	# Where a connection is lost nobody reads what ranks say, and a rank that says something would fail before it has saved.
	exec > >(trap '' TERM USR1 INT && exec tee -p /dev/null) 2> >(trap '' TERM USR1 INT && exec tee -p /dev/null >&2)
fi
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$((NODES * RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$RANKS_PER_NODE
for ((local_rank = 0; local_rank < RANKS_PER_NODE; local_rank++)); do
	RANK=$((NODE_RANK * RANKS_PER_NODE + local_rank)) LOCAL_RANK=$local_rank "$PYTHON" -u "$@" &
	ranks+=($!)
done
[[ -z $heard ]] || pass_on "$heard"

if [[ -n ${SIGNALS_FROM_STDIN:-} ]]; then
	exec 3<&0
	{
		while read -r name; do
			if [[ $name == KILL ]]; then
				kill -s KILL "${ranks[@]}"
			else
				kill -s "$name" $$
			fi
		done
		kill -s TERM $$ # whoever started this is gone
	} <&3 2>/dev/null &
	listener=$!
fi

codes=()
deadline=
left=("${ranks[@]}")
while ((${#left[@]} > 0)); do
	running=()
	for rank in "${left[@]}"; do
		if kill -0 "$rank" 2>/dev/null; then
			running+=("$rank")
			continue
		fi
		status=0
		wait "$rank" || status=$?
		codes+=("$status")
		# The others would wait for it until their collectives time out. They may be saying what is wrong.
		((status == 0 || status == 75)) || : "${deadline:=$((SECONDS + PATIENCE_SECONDS))}"
	done
	left=("${running[@]+"${running[@]}"}")
	if ((${#left[@]} > 0)) && [[ -n $deadline ]] && ((SECONDS >= deadline)); then
		kill -s KILL "${left[@]}" 2>/dev/null || true
		wait "${left[@]}" 2>/dev/null || true
		break
	fi
	((${#left[@]} == 0)) || { sleep 0.5 & wait $! || true; } # in the background: a trap runs at once
done

weight() { # of an exit code: the heaviest is the node's
	case $1 in
	0) echo 0 ;;
	75) echo 1 ;;
	69) echo 2 ;;
	*) echo 3 ;;
	esac
}
code=0
for status in "${codes[@]}"; do
	# The signal ends a rank that does not listen yet, or no more; the same command goes on from what is saved.
	# 128 + SIGTERM or SIGUSR1, or -1: what bash 5.2 makes of a child that dies while a trap is due.
	[[ $heard == "" || $heard == KILL || ! $status =~ ^(143|138|-1)$ ]] || status=75
	(($(weight "$status") <= $(weight "$code"))) || code=$status
done
exit "$code"

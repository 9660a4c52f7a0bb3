#!/usr/bin/env bash
# A run on a few machines without a scheduler: starts node.sh on each over ssh and stays until all have ended.
#
#   launch/cluster/ssh.sh HOSTFILE --config my.yaml
#
# HOSTFILE has DeepSpeed's format, "HOST slots=RANKS" a line. The repository lies at the same path on all hosts, on a file system
# that they share, and ssh gets there without a password. All other arguments go to launch/train.py.
#
# Ctrl-C or SIGTERM: the run finishes its step, saves and leaves; Ctrl-C again ends it at once. If this script or a connection is
# lost, the ranks save and leave as well, and nothing stays behind. Start it again: it goes on from the newest checkpoint.
#
# It leaves with the worst code of the hosts: 0 all is done, 75 asked to leave and saved, 69 hosts are missing, any other a failure.
#
# Variables (default), besides PYTHON of node.sh:
#   MASTER_PORT (29500)         a port that is free there
#   PROGRAM (launch/train.py)   a program other than train.py is not given --run.resume
#   MASTER_ADDR (first host)    its name or address as the others reach it
#   EXPORT ()                   names of variables that the ranks shall have as well, such as "HF_HUB_OFFLINE WANDB_MODE". Those that are set and
#                               begin with NCCL_, GLOO_ or OMP_ they have anyway. ps shows the values: no secrets (~/.netrc has W&B's key)
#   PATIENCE_SECONDS (15)       from the first host's failure to the end of the others; one that knows the cause ends some seconds after
#   SSH (ssh -o BatchMode=yes -o ServerAliveInterval=60)   how to get there. A connection is given up after three times that, and the
#                               other hosts' ranks are killed: not before they have found out themselves, run.lost_after_seconds, and said so
set -euo pipefail
fail() {
	echo "error: $1" >&2
	exit 2
}
if [[ ! -r ${1:-} ]]; then
	fail "${1:-nothing} is no readable HOSTFILE. Write ssh.sh HOSTFILE --config RECIPE.yaml."
fi
hostfile=$1
shift
PROGRAM=${PROGRAM:-launch/train.py}
PATIENCE_SECONDS=${PATIENCE_SECONDS:-15}
[[ $PATIENCE_SECONDS =~ ^[0-9]+$ ]] || fail "PATIENCE_SECONDS is '$PATIENCE_SECONDS'. Give a whole number."
SSH=${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=60}

hosts=()
slots=
while read -r host count _ || [[ -n $host ]]; do # the last line need not end
	host=${host%$'\r'} count=${count%$'\r'}
	[[ -z $host || $host == \#* ]] && continue
	[[ $count =~ ^slots=[1-9][0-9]*$ ]] || fail "'$host $count' in $hostfile has no slots. Write HOST slots=RANKS."
	count=${count#slots=}
	[[ ${slots:=$count} == "$count" ]] || fail "$hostfile has hosts with different slots. Give all as many."
	hosts+=("$host")
done <"$hostfile"
((${#hosts[@]} > 0)) || fail "$hostfile names no host. Write HOST slots=RANKS."

program=("$PROGRAM")
[[ $PROGRAM == *train.py ]] && program+=(--run.resume auto)
settings="NODES=${#hosts[@]} RANKS_PER_NODE=$slots MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} MASTER_PORT=${MASTER_PORT:-29500}"
[[ -n ${PYTHON:-} ]] && settings+=" PYTHON=$(printf %q "$PYTHON")"
for name in ${EXPORT:-}; do
	[[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "EXPORT has '$name', which is no name. Separate names of variables with spaces."
	[[ -n ${!name+set} ]] || fail "EXPORT names $name, which is not set. Set it, or leave it out."
done
for name in $(compgen -e | grep -E '^(NCCL|GLOO|OMP)_' || true) ${EXPORT:-}; do
	settings+=" $name=$(printf %q "${!name}")"
done
words=$(printf '%q ' "${program[@]}" "$@")

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
connections=()
mouths=()
tell() { # writes the name of a signal to every node
	for mouth in "${mouths[@]}"; do
		echo "$1" >&"$mouth" || true
	done
} 2>/dev/null
trap 'tell TERM' TERM
trap 'tell USR1' USR1
interrupted=
trap 'if [[ -z $interrupted ]]; then tell TERM; else tell KILL; fi; interrupted=1' INT
trap '' PIPE

for node in "${!hosts[@]}"; do
	mkfifo "$pipes/$node"
	# shellcheck disable=SC2086  # several words
	$SSH "${hosts[node]}" "cd $(printf %q "$PWD") && SIGNALS_FROM_STDIN=1 NODE_RANK=$node $settings launch/cluster/node.sh $words" \
		<"$pipes/$node" &
	connections+=($!)
	exec {mouth}>"$pipes/$node"
	mouths+=("$mouth")
done

weight() { # of an exit code: the heaviest is the run's
	case $1 in
	0) echo 0 ;;
	75) echo 1 ;;
	69) echo 2 ;;
	*) echo 3 ;;
	esac
}
code=0
deadline=
killed=
left=("${connections[@]}")
while ((${#left[@]} > 0)); do
	running=()
	for connection in "${left[@]}"; do
		if kill -0 "$connection" 2>/dev/null; then
			running+=("$connection")
			continue
		fi
		status=0
		wait "$connection" || status=$?
		[[ -z $killed ]] || continue # what a killed node leaves with says nothing
		(($(weight "$status") <= $(weight "$code"))) || code=$status
		((status == 0 || status == 75)) || : "${deadline:=$((SECONDS + PATIENCE_SECONDS))}"
	done
	if [[ -z $killed && -n $deadline ]] && ((SECONDS >= deadline)); then
		killed=1
		tell KILL # the other nodes would wait for the one that is gone
	fi
	left=("${running[@]+"${running[@]}"}")
	((${#left[@]} == 0)) || { sleep 0.5 & wait $! || true; }
done
exit "$code"

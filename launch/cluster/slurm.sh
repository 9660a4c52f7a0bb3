#!/usr/bin/env bash
# A run on Slurm: one task per node, which starts the node's ranks. Ended by preemption or by the end of its time, it saves, is
# queued again and goes on from there; after the loss of a node it goes on from the newest checkpoint. A job that scancel has ended,
# and one that has failed in another way, is not queued again.
#
#   sbatch --nodes 8 launch/cluster/slurm.sh --config launch/recipes/qwen3_32b_to_8b_math.yaml
#
# From the repository's root, on a file system that all nodes share. What stands below as #SBATCH can be given to sbatch, too:
# partition, account and time at least. All arguments go to launch/train.py.
#
# Variables (default), besides PYTHON of node.sh:
#   RANKS_PER_NODE (GPUs that Slurm gives on a node)
#   MASTER_PORT (by the job's number)
#   LAUNCHER (srun)        srun, or deepspeed: over ssh, from the hostfile. Slurm's signals do not reach ranks that ssh has
#                          started, so that a preemption then costs the steps since the last checkpoint (the ranks are gone when its
#                          grace is over); and of all hosts' exit codes the largest counts: a crash (1) beside hosts that miss it (69)
#                          is tried LOSSES times
#   HOSTFILE (runs/hostfile-JOB)   where the allocation is written, "HOST slots=RANKS" a line
#   LOSSES (10)            how often the job is queued again because nodes were lost that Slurm still has, or after less than ten minutes;
#                          counted in HOSTFILE.losses. If Slurm itself finds a node down, it queues the job again, uncounted
#                          (JobRequeue, --requeue)
#   WAIT_SECONDS (300)     from the end of the first node to that of the others, which then are killed. Longer than
#                          run.lost_after_seconds, after which they say who is lost; and so long that Slurm notices a node that is down
#                          (SlurmdTimeout, 300, and some more): Slurm 22.05 starts no step with GPUs in a job that was queued again before
#   PROGRAM (launch/train.py)      launch/evaluate.py, e.g.; a program other than train.py is not given --run.resume
#   SRUN_ARGS              more for srun, such as --container-image=... --container-mounts=...
#
#SBATCH --job-name=katds
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# To the ranks, so long before the time is over: a step, and a checkpoint, must fit. For preemption it is the partition's GraceTime.
#SBATCH --signal=USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
HOSTFILE=${HOSTFILE:-runs/hostfile-$SLURM_JOB_ID}
PROGRAM=${PROGRAM:-launch/train.py}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mkdir -p "$(dirname "$HOSTFILE")"
awk -v ranks="$RANKS_PER_NODE" '{print $1 " slots=" ranks}' <<<"$hosts" >"$HOSTFILE"

[[ -n ${SLURM_RESTART_COUNT:-} ]] || rm -f "$HOSTFILE.losses" # of another job that had this number

NODES=$(wc -l <"$HOSTFILE")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # of its own, where jobs share a node
export RANKS_PER_NODE NODES MASTER_ADDR MASTER_PORT

program=("$PROGRAM")
[[ $PROGRAM == *train.py ]] && program+=(--run.resume auto)
trap : TERM USR1 # the ranks hear them; this script must live until they have saved
code=0
case ${LAUNCHER:-srun} in
srun)
	# Of all nodes' exit codes srun tells the largest, which need not be that of the cause, and another for nodes that are gone.
	codes=$HOSTFILE.codes
	rm -rf "$codes"
	mkdir "$codes"
	# srun does not take over the batch job's CPUs per task, and would bind all ranks of a node to one core. With --kill-on-bad-exit the
	# first node to leave with 75 would have the others killed while they leave.
	# shellcheck disable=SC2016,SC2086  # each node expands its own place; SRUN_ARGS are several words
	CODES=$codes srun --kill-on-bad-exit=0 --wait="${WAIT_SECONDS:-300}" \
		--cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" ${SRUN_ARGS:-} \
		bash -c 'CODE_FILE=$CODES/$SLURM_NODEID NODE_RANK=$SLURM_NODEID exec launch/cluster/node.sh "$@"' node "${program[@]}" "$@" || code=$?
	said=$(cat "$codes"/* 2>/dev/null | sort -un) || true # nodes that are gone have said nothing
	said=${said:-$code}                                    # in a container that does not see the folder, none has
	;;
deepspeed)
	if [[ -z ${PYTHON:-} ]]; then
		PYTHON=python3
		[[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
	fi
	# A job's PATH need not have the command `deepspeed`; this is what it runs.
	"$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
		"${program[@]}" "$@" || code=$?
	said=$code
	;;
*)
	echo "error: LAUNCHER is '$LAUNCHER'. Give srun or deepspeed." >&2
	exit 2
	;;
esac

((code != 0)) || exit 0
cause=$(grep -vxE '0|69|75' <<<"$said" | head -1) || true
[[ -z $cause ]] || exit "$cause" # what is wrong would be wrong again
case $said in
*69*) code=69 end="nodes are lost" ;;
*75*) code=75 end=saved ;;
*) exit "$code" ;;
esac
# Whom scancel has ended must not come back, and if Slurm has found nodes gone before us, it has queued the job itself.
if [[ ! $(scontrol show job "$SLURM_JOB_ID") =~ JobState=RUNNING|Reason=TimeLimit ]]; then
	echo "$end; job $SLURM_JOB_ID was ended by Slurm or by scancel"
	exit "$code"
fi
if ((code == 69 || SECONDS < 600)); then # so short a start may have saved nothing new, and the next one would be signalled as early
	echo "start $((${SLURM_RESTART_COUNT:-0} + 1))" >>"$HOSTFILE.losses"
	losses=$(wc -l <"$HOSTFILE.losses")
	if ((losses > ${LOSSES:-10})); then
		echo "error: $end, $losses times; job $SLURM_JOB_ID is not queued again. The same sbatch goes on; --time must be longer than" \
			"what --signal takes off it, and than loading the models." >&2
		exit "$code"
	fi
fi
# Slurm ends what is left of the job, this command among it, while it is being answered.
(trap '' TERM && exec scontrol requeue "$SLURM_JOB_ID") || {
	echo "error: job $SLURM_JOB_ID cannot be queued again ($end). The same sbatch goes on." >&2
	exit "$code"
}
echo "$end; job $SLURM_JOB_ID is queued again"
exit "$code"

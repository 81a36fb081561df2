#!/usr/bin/env bash
# Runs a sweep on every node of a SLURM allocation, or resumes it; slurm_cpu.sbatch and
# slurm_gpu.sbatch start it with: CONFIG RESULTS NAME (RESULTS: a folder that all nodes see, or s3://...).
set -euo pipefail
config=${1:?CONFIG is missing} results=${2:?RESULTS is missing} name=${3:?NAME is missing}
export PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH # sgrl, where `make quickstart` installed it

# One thread per process: trials run side by side. No draining of nodes when they are told to stop:
# trials go on from their checkpoints.
export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
# Every connection has to show this job's token, which srun hands to all nodes in their environment.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN SLURM_EXPORT_ENV=ALL

# Ports and folders of this job alone: two jobs may share a node, as may other users of Ray. The
# remaining ports are the kernel's choice. Paths are short, as Unix sockets allow 107 characters.
port=$((20000 + SLURM_JOB_ID % 3000 * 4)) # below the kernel's own range
address=${HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)} # this script runs on the first node
export RAY_ADDRESS=$address:$port
ray_options=(
  --block --temp-dir "/tmp/sgrl-$SLURM_JOB_ID" --num-cpus "$SLURM_CPUS_PER_TASK"
  --object-store-memory 500000000 # bytes; Ray would take a third of a node that is not all ours
  --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port $((port + 1))
)
head_options=(
  --head --node-ip-address "$address" --port "$port" --include-dashboard false
)
if python -c 'import grpc' 2>/dev/null; then # Ray's client server is there too
  head_options+=(--ray-client-server-port $((port + 2)))
fi

ray='' sweep=''
stop() { # what this script started, and nothing else: `ray stop` would end every Ray of this user
  trap '' TERM USR1
  for process in $sweep $ray; do
    kill "$process" 2>/dev/null || true
    wait "$process" || true
  done
  timeout 20 srun --ntasks-per-node=1 rm -rf "/tmp/sgrl-$SLURM_JOB_ID" || true
}
preempted() { # or out of time: SLURM gives notice of it (--signal)
  echo "stopping: the job is queued again and resumes the sweep"
  trap - EXIT
  stop
  scontrol requeue "$SLURM_JOB_ID"
  exit
}
trap stop EXIT
trap 'exit 143' TERM
trap preempted USR1

# One Ray node per SLURM node; --no-kill: the sweep goes on where a node is lost.
# shellcheck disable=SC2016  # the nodes' shells are to fill these in, not this one
srun --no-kill --kill-on-bad-exit=0 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  bash -c 'heads=$1; shift
    if [ "$SLURM_NODEID" = 0 ]; then exec ray start "$@"; fi
    for _ in {1..120}; do (: <"/dev/tcp/${RAY_ADDRESS/://}") 2>/dev/null && break; sleep 1; done
    exec ray start --address "$RAY_ADDRESS" "${@:heads+1}"' \
  ray "${#head_options[@]}" "${head_options[@]}" "${ray_options[@]}" &
ray=$!

for _ in {1..120}; do # a head that failed to start has said why above
  (: <"/dev/tcp/${RAY_ADDRESS/://}") 2>/dev/null && break
  kill -0 "$ray" && sleep 1
done
python - "$SLURM_JOB_NUM_NODES" <<'END' &
import sys, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
wanted, deadline = int(sys.argv[1]), time.monotonic() + 300
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        print(f"going on with {there} of {wanted} nodes")
        break
    time.sleep(1)
END
sweep=$!
wait "$sweep"

if sgrl status "$results/$name" >/dev/null 2>&1; then
  sgrl resume "$results/$name" &
else
  sgrl sweep "$config" --results "$results" --name "$name" &
fi
sweep=$!
wait "$sweep"

#!/usr/bin/env bash
# Stop the local SLURM that up.sh started, with its jobs, and remove its folder (SLURM_LOCAL_DIR, as for up.sh).
set -euo pipefail

dir=${SLURM_LOCAL_DIR:-/tmp/evolute-slurm}
export SLURM_CONF=$dir/slurm.conf
[[ -f $SLURM_CONF ]] || {
    echo "down.sh: no cluster in $dir" >&2
    exit 1
}

PATH=$PATH:/usr/sbin:/sbin

# Stop the daemon that a pid file names, if it is still that program, and wait for its end.
stop() {
    local pid tries
    pid=$(cat "$dir/$1.pid" 2>/dev/null) || return 0
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$1" ]] || return 0
    kill "$pid" 2>/dev/null || return 0
    for ((tries = 0; tries < 100; tries++)); do
        [[ -e /proc/$pid ]] || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}
# The processes of this cluster's jobs carry its SLURM_CONF and a job's number; a shell that only looks on has no number.
jobs_left() {
    local environ
    for environ in /proc/[0-9]*/environ; do
        if grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environ" && grep -qz '^SLURM_JOB_ID=' "$environ"; then
            environ=${environ#/proc/}
            echo "${environ%/environ}"
        fi
    done 2>/dev/null
}

if [[ -e $dir/slurmctld.pid ]] && timeout 5 sinfo -h >/dev/null 2>&1; then
    timeout 5 squeue -h -o %A | xargs -r timeout 5 scancel >/dev/null 2>&1 || true
    for ((tries = 0; tries < 150; tries++)); do
        [[ -n $(timeout 5 squeue -h 2>/dev/null) ]] || break
        sleep 0.1
    done
fi
for daemon in slurmd slurmctld munged; do
    stop $daemon
done
for pid in $(jobs_left); do
    kill -KILL "$pid" 2>/dev/null || true
done
rm -rf "$dir"

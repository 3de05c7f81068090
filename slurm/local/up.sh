#!/usr/bin/env bash
# Start a SLURM of one node on this machine: its own munged, slurmctld and slurmd, with all they write in one folder.
#
#   eval "$(slurm/local/up.sh)"   # prints the variable that points sbatch and the rest at it
#   sinfo
#   slurm/local/down.sh           # stops what this started, and nothing else
#
# Needs root, and Debian's packages: apt-get install --no-install-recommends slurm-wlm munge
#
#   SLURM_LOCAL_DIR    the folder, default /tmp/evolute-slurm; two clusters need two folders
#   SLURM_LOCAL_PORT   port of slurmctld, default 16817; slurmd takes the next one
#   SLURM_LOCAL_CPUS   processors the node claims to have, default 4: they are counted, not reserved
#   SLURM_LOCAL_REQUEUE_DELAY   seconds that a requeued job waits at least, default 5 (SLURM's own is 120)
set -euo pipefail

dir=${SLURM_LOCAL_DIR:-/tmp/evolute-slurm}
port=${SLURM_LOCAL_PORT:-16817}
cpus=${SLURM_LOCAL_CPUS:-4}
delay=${SLURM_LOCAL_REQUEUE_DELAY:-5}
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "up.sh: $*" >&2
    [[ ! $begun ]] || "$(dirname "$0")/down.sh" >&2 || true # what was started goes again
    exit 1
}
begun=
listening() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

for program in munged slurmctld slurmd sinfo; do
    command -v $program >/dev/null || fail "no $program: apt-get install --no-install-recommends slurm-wlm munge"
done
((EUID == 0)) || fail "needs root: slurmd starts each job as the user it belongs to"
[[ ! -e $dir ]] || fail "$dir exists: stop the cluster there with down.sh, or choose another SLURM_LOCAL_DIR"
for taken in "$port" $((port + 1)); do
    ! listening "$taken" || fail "port $taken is taken: choose another SLURM_LOCAL_PORT"
done
trap 'fail "line $LINENO failed"' ERR

begun=1
mkdir -p "$dir"/{state,spool,log,munge}
chmod 755 "$dir" "$dir"/munge
head -c 128 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket=$dir/munge/socket,cred_expire=$delay
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
JobRequeue=1
KillWait=10
# Jobs in 'urgent' put those in 'debug' back into the queue, and give them GraceTime to save first.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
CONF
# Nothing is confined, so the plugin for v1 serves where the machine has v2 as well; the one for v2 wants systemd.
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$dir/cgroup.conf"

# Forced: munged wants its socket open to every user of the machine, also where the folder is not.
munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" 2>"$dir/log/munged.err" || fail "$(cat "$dir/log/munged.err")"
slurmctld || fail "slurmctld did not start: $(tail -n 3 "$dir/log/slurmctld.log")"
slurmd || fail "slurmd did not start: $(tail -n 3 "$dir/log/slurmd.log")"
for ((tries = 0; tries < 100; tries++)); do
    [[ $(sinfo -h -p debug -o %T 2>/dev/null) != idle ]] || break
    sleep 0.1
done
((tries < 100)) || fail "the node did not come up: $(tail -n 3 "$dir/log/slurmd.log")"
echo "export SLURM_CONF=$SLURM_CONF"

#!/usr/bin/env bash
# A Slurm of two emulated nodes on this host, for tests/bench/jobs/test_slurm_cluster.py. For root on Debian 12,
# with or without systemd.
#
#   .ci/start_slurm.sh         install, start, return when both nodes are idle
#   .ci/start_slurm.sh stop    end its jobs and what start started
#
# The nodes are two slurmd with ports of their own; they share the host's cores, so that they test
# function, never performance. A second start finds the cluster running and changes nothing.
set -euo pipefail

state=/var/lib/fedara-slurm  # logs, pid files, what slurmctld and slurmd keep
conf=/etc/slurm/slurm.conf   # where sinfo, sbatch and srun look by themselves
cluster=fedara-test
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)
limit_seconds=60

fail() {  # MESSAGE: say it, with the nodes' states and the ends of the logs, and give up
  echo "start_slurm: $1" >&2
  if controller_answers; then timeout 10 sinfo --Node --long >&2 || true; fi
  for log in "$state"/*.log /var/log/munge/munged.log; do
    if [ -s "$log" ]; then
      echo "---- end of $log" >&2
      tail -n 20 "$log" >&2
    fi
  done
  exit 1
}

wait_until() {  # WHAT COMMAND...: poll until the command succeeds
  local what=$1 end=$((SECONDS + limit_seconds))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || fail "$what: not within $limit_seconds s"
    sleep 0.2
  done
}

ours() { grep -qs "^ClusterName=$cluster\$" "$conf"; }
munge_answers() { munge --no-input 2>/dev/null | unmunge >/dev/null 2>&1; }
controller_answers() { timeout 10 scontrol ping >/dev/null 2>&1; }
nodes_idle() { [ "$(timeout 10 sinfo -hNo %T 2>/dev/null | grep -c '^idle$')" = 2 ]; }
gone() { ! grep -qs "^State:[[:space:]]*[^ZX]" "/proc/$1/status"; }

install_packages() {
  dpkg --status "${packages[@]}" >/dev/null 2>&1 && return
  command -v apt-get >/dev/null || fail "no apt-get here; needed: Debian, or ${packages[*]} installed"
  echo "start_slurm: installing ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  {
    apt-get update &&
      apt-get install --yes --no-install-recommends "${packages[@]}"
  } >"$state/apt.log" 2>&1 || fail "apt-get could not install ${packages[*]}"
}

write_conf() {
  local host
  host=$(uname -n)
  host=${host%%.*}
  getent hosts "$host" >/dev/null || fail "this host's name, $host, has no address in /etc/hosts"
  mkdir -p "$(dirname "$conf")"
  cat >"$conf" <<END
# Written by .ci/start_slurm.sh.
ClusterName=$cluster
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
# No id twice, also after a state that is lost: MPICH names its shared memory by the job's id.
FirstJobId=$(($(date +%s) / 60))
AuthType=auth/munge
# A requeued job may start again after so many seconds; 120 if not said.
AuthInfo=cred_expire=10
SchedulerParameters=sched_interval=2

NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=8
PartitionName=test Nodes=ALL Default=YES MaxTime=01:00:00
# The nodes have the CPUs that are said above, not those that slurmd finds.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=pmi2

# No cgroups: containers mostly do not give them away.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none

# Ended jobs are shown for an hour: tests ask how they ended.
MinJobAge=3600
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/%n.log
END
}

start() {
  [ "$(id -u)" = 0 ] || fail "needs root"
  if [ -e "$conf" ] && ! ours; then
    fail "$conf is of another cluster and stays as it is"
  fi
  if ours && controller_answers && nodes_idle; then
    echo "start_slurm: already running"
    return
  fi
  mkdir -p "$state/slurmctld" "$state/n1" "$state/n2"
  install_packages
  write_conf
  if ! munge_answers; then
    install --directory --owner=munge --group=munge /run/munge
    [ -e /etc/munge/munge.key ] || runuser -u munge -- mungekey
    runuser -u munge -- munged || fail "munged did not start"
    touch "$state/munged.started"
  fi
  wait_until "munge" munge_answers
  # Each leaves the terminal by itself and does not start twice: it holds a lock on its pid file.
  controller_answers || slurmctld -c || fail "slurmctld did not start"
  wait_until "slurmctld" controller_answers
  for node in n1 n2; do
    running "$node" || slurmd -N "$node" || fail "slurmd of $node did not start"
  done
  wait_until "both nodes idle" nodes_idle
  echo "start_slurm: $(sinfo --version), nodes n1 and n2 idle after $SECONDS s"
}

running() { [ -s "$state/$1.pid" ] && ! gone "$(cat "$state/$1.pid")"; }

stop() {
  ours || fail "$conf is not of this script; nothing to stop"
  if controller_answers; then
    scancel --quiet --user="$(id -un)" || true
    wait_until "the end of all jobs" no_jobs
  fi
  for name in n1 n2 slurmctld; do
    if running "$name"; then
      pid=$(cat "$state/$name.pid")
      kill "$pid"
      wait_until "the end of $name" gone "$pid"
    fi
  done
  if [ -e "$state/munged.started" ]; then
    runuser -u munge -- munged --stop >/dev/null
    rm "$state/munged.started"
  fi
  echo "start_slurm: stopped; logs in $state"
}

no_jobs() { [ -z "$(timeout 10 squeue -ho %i)" ]; }

case ${1:-start} in
  start) start ;;
  stop) stop ;;
  *) fail "unknown word $1; allowed: start, stop" ;;
esac

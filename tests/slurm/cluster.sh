#!/usr/bin/env bash
# A real SLURM of two nodes, n1 and n2, on this host: `cluster.sh up`, `cluster.sh down`. As root, without systemd, from Debian's packages.
# Each node has two CPUs, 64 GB on paper and one GPU that is none: a null device, so that SLURM counts it and sets CUDA_VISIBLE_DEVICES.
# Exit status 77: not on this machine (not root, no apt, a cluster that is not ours); it says which.
set -euo pipefail

state=/run/oacore-slurm # key, sockets, pid files, logs, spool
config=/etc/slurm       # nowhere else: the plugin's job steps drop every SLURM_* variable, SLURM_CONF too
mark="# written by tests/slurm/cluster.sh"

refuse() {
  echo "cluster.sh: $*" >&2
  exit 77
}

ours() { [[ ! -e $1 ]] || grep -qxF "$mark" "$1"; }

running() { [[ -s $state/$1.pid ]] && kill -0 "$(<"$state/$1.pid")" 2>/dev/null; }

# Whether a command succeeds within 20 s.
soon() {
  for _ in {1..200}; do
    "$@" && return
    sleep 0.1
  done
  return 1
}

check() {
  ((EUID == 0)) || refuse "only root may start SLURM's daemons"
  for file in slurm.conf gres.conf; do
    ours $config/$file || refuse "$config/$file is not of this script: there is a SLURM on this machine"
  done
}

install() {
  local packages=(slurmctld slurmd slurm-client munge)
  dpkg-query --show --showformat='${Status}\n' "${packages[@]}" 2>/dev/null | grep -c "ok installed" | grep -qx ${#packages[@]} && return
  command -v apt-get >/dev/null || refuse "${packages[*]} are not installed, and there is no apt-get"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install --no-install-recommends "${packages[@]}"; } >"$state/apt.log" 2>&1 ||
    refuse "apt-get could not install ${packages[*]}: $(tail -n 1 "$state/apt.log")"
}

write_config() {
  local host
  host=$(hostname -s)
  mkdir -p $config
  tee $config/slurm.conf >/dev/null <<EOF
$mark
ClusterName=oacore
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket
# No cgroups, no accounting: neither works in a plain container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# squeue must know finished jobs for three times the seconds before the plugin's first status check, or the plugin asks sacct.
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
# Believe the sizes below.
SlurmdParameters=config_overrides
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/%n.log
SlurmctldPort=17000
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=64000 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
EOF
  printf '%s\nNodeName=n[1-2] Name=gpu File=%s\n' "$mark" $state/gpu0 >$config/gres.conf
}

both_idle() { [[ $(sinfo --noheader --Node --format=%t 2>/dev/null | sort | uniq -c | xargs) == "2 idle" ]]; }

up() {
  check
  for daemon in slurmctld munged; do
    if running $daemon; then
      echo "cluster.sh: it is up already, perhaps after a killed test; \`$0 down\` stops it" >&2
      exit 1
    fi
  done
  rm -rf $state
  mkdir -p $state/ctld $state/spool-n1 $state/spool-n2
  install
  write_config
  mknod $state/gpu0 c 1 3
  (umask 077 && head -c 1024 /dev/urandom >$state/munge.key)
  munged --force --key-file=$state/munge.key --socket=$state/munge.socket --pid-file=$state/munged.pid \
    --log-file=$state/munged.log --seed-file=$state/munged.seed
  slurmctld
  slurmd -N n1
  slurmd -N n2
  if ! soon both_idle; then
    tail -n 5 $state/*.log >&2
    down
    exit 1
  fi
}

queue_empty() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }

down() {
  check
  if running slurmctld; then
    scancel --user=root # else the jobs would outlive the daemons
    soon queue_empty || echo "cluster.sh: jobs are left: $(squeue)" >&2
  fi
  # With a configuration whose controller is not there, `scontrol` tries for 9 s, and with the plugin every call of Snakemake waits for it.
  rm -f $config/slurm.conf $config/gres.conf
  for daemon in n1 n2 slurmctld munged; do
    ! running $daemon || kill "$(<$state/$daemon.pid)"
    soon eval "! running $daemon"
  done
  rm -rf $state
}

case ${1-} in
  up) up ;;
  down) down ;;
  *)
    echo "usage: $0 up|down" >&2
    exit 2
    ;;
esac

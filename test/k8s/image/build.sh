#!/bin/sh
# What runs in the pod, with busybox: says what the pod may do, runs `kiln build` with the arguments given, and says what
# processor time and memory it took. test.sh reads the lines that begin with "pod: ".
set -eu

echo "pod: uid $(id -u)"
sed -nE 's/^(CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):[[:space:]]*/pod: \1 /p' /proc/self/status
if (: > /written) 2> /dev/null; then echo "pod: root file system writable"; else echo "pod: root file system read-only"; fi
kiln info | sed -n 's/^Sandbox: */pod: sandbox /p'

# Cgroup v1 has its controllers in directories, v2 all in one. The peak that the kernel keeps counts the page cache as well,
# that is whatever of the store happens to be in memory; what cannot be dropped has to be sampled.
cgroup=/sys/fs/cgroup
[ ! -d $cgroup/memory ] || cgroup=$cgroup/memory
(while sed -nE 's/^(rss|anon|shmem) //p' $cgroup/memory.stat > /tmp/now 2> /dev/null; do
  awk '{ n += $1 } END { print n }' /tmp/now >> /tmp/samples
  sleep 1
done) &
sampler=$!

status=0
kiln build "$@" || status=$?

kill $sampler
# In the pod's time all processes count, in whoever's wait they end.
if [ -r /sys/fs/cgroup/cpu.stat ]; then
  sed -n 's/^usage_usec //p' /sys/fs/cgroup/cpu.stat
else
  awk '{ print $1 / 1000 }' /sys/fs/cgroup/cpuacct/cpuacct.usage
fi | awk '{ printf "pod: cpu %.1f s\n", $1 / 1e6 }'
peak=$(cat $cgroup/memory.peak $cgroup/memory.max_usage_in_bytes 2> /dev/null || true)
[ -z "$peak" ] || echo "pod: memory peak $((peak >> 20)) MiB with the page cache"
sort -n /tmp/samples | tail -n 1 | awk '{ printf "pod: memory peak %d MiB without (a sample a second)\n", $1 / 1048576 }'
exit $status

#!/bin/bash
# Tests of the lab itself (not of systemd): exit codes, closed fds, timeout, signals, kill -9, concurrency.
# Exits 0 if all hold. About 25 s.
here=$(cd "$(dirname "$0")" && pwd); lab=$here/lab; id=st$$; bad=0
ok() { if [[ $2 == "$3" ]]; then echo "ok   $1"; else echo "FAIL $1: want '$3', got '$2'"; bad=1; fi; }
left() { find /sys/fs/cgroup -name "lab.$1*" 2>/dev/null; ls -d /run/systemd-lab/m/$1* 2>/dev/null; }
T=$(mktemp -d); trap 'rm -rf "$T"; [[ -d /run/systemd-lab/m/'$id'a ]] && "$lab" stop '$id'a' EXIT

ok "stdout"                    "$("$lab" run -- sh -c 'echo out; echo err >&2' 2>/dev/null)" out
ok "stderr"                    "$("$lab" run -- sh -c 'echo out; echo err >&2' 2>&1 >/dev/null)" err
ok "stdin"                     "$(echo hello | "$lab" run -- cat)" hello
ok "dollars are left alone"    "$("$lab" run -- echo '$HOME ${HOME} $$ %n')" '$HOME ${HOME} $$ %n'
"$lab" run -- sh -c 'exit 42';                     ok "exit code" $? 42
"$lab" run -- sh -c 'exit 3' <&- >&- 2>&-;         ok "all three fds closed" $? 3
"$lab" run --enable none.service -- true 2>/dev/null;  ok "a lab failure is 125" $? 125
printf '#!/bin/sh\nreadlink /proc/1/exe; exit 9\n' >"$T/s.sh"; chmod +x "$T/s.sh"
out=$(cd "$T" && "$lab" run -- ./s.sh);            ok "script from /tmp" "$?$out" 9/usr/lib/systemd/systemd
echo one >"$T/f"
"$lab" run --mount "$T:/mnt/t" --copy "$T/f:/opt/x/" -- sh -c 'cmp /mnt/t/f /opt/x/f && ! touch /mnt/t/no 2>/dev/null'; ok "mount is read-only, copy" $? 0
"$lab" run --mount-rw "$T:/mnt/t" -- sh -c 'echo two >/mnt/t/g'; ok "mount-rw" "$(cat "$T/g")" two
touch /lab-nope 2>/dev/null; rm -f /lab-nope; "$lab" run -- touch /lab-nope; ok "host root is not written" "$(ls /lab-nope 2>&1 | grep -c 'No such')" 1
s=$SECONDS; "$lab" run --timeout 2 -- sleep 99 2>/dev/null; ok "timeout code" $? 124; ok "timeout in time" $((SECONDS - s < 6)) 1
for sig in TERM INT HUP; do
    env --default-signal=INT "$lab" run -- sleep 99 2>/dev/null & p=$!; sleep 1; { kill -$sig $p; wait $p; r=$?; } 2>/dev/null
    ok "SIG$sig" $r $((128 + $(kill -l $sig)))
    ok "nothing left after $sig" "$(left r$p)" ""
done
"$lab" run -- sleep 99 2>/dev/null & p=$!; sleep 1; { kill -KILL $p; wait $p; } 2>/dev/null; sleep 3; "$lab" gc
ok "nothing left after kill -9" "$(left r$p)$(pgrep -f "lab __boot r$p-")" ""
for i in 1 2 3 4 5 6; do ( "$lab" run -- sh -c "sleep 0.3; exit $i"; echo $? >"$T/c$i" ) & done; wait $(jobs -p) 2>/dev/null
ok "six at once" "$(cat "$T"/c?| tr -d '\n')" 123456

"$lab" start ${id}a;                               ok "a machine that stays" $? 0
"$lab" start ${id}a 2>/dev/null;                   ok "a name is taken once" $? 125
"$lab" exec ${id}a -p DynamicUser=yes -- sh -c '[ $(id -u) -gt 60000 ]'; ok "exec with properties" $? 0
"$lab" exec ${id}a --unit=long -- sleep 60 2>/dev/null & p=$!; sleep 0.5; { kill $p; wait $p; } 2>/dev/null
ok "an interrupted exec leaves its unit" "$("$lab" exec ${id}a -- systemctl is-active long)" active
s=$SECONDS; "$lab" stop ${id}a; ok "stop is quick" $((SECONDS - s < 3)) 1; ok "nothing left of it" "$(left $id)" ""
ok "no mounts left" "$(grep -c "systemd-lab.*$id" /proc/mounts)" 0
exit $bad

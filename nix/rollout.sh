# Restarts what is running of Banter, one process after the other, each once the one before is ready:
# somebody is always there to serve, and when one does not come up again the others stay as they were.
#   rollout.sh start      notes where Banter listens
#   rollout.sh reload     a switch has changed something that takes a restart
set -eu
PATH=/run/current-system/systemd/bin:/run/current-system/sw/bin
noted=$RUNTIME_DIRECTORY/listen

listen() {
	systemctl show --property=Listen banter.socket
}

case $1 in
start)
	listen >"$noted"
	;;
reload)
	if [ "$(listen)" = "$(cat "$noted")" ]; then
		systemctl try-restart banter.service
	else
		# systemd closes a socket whose addresses have changed, and NixOS restarts none. A socket cannot
		# be started beside its running service.
		running=
		if systemctl --quiet is-active banter.service; then running=banter.service; fi
		systemctl stop banter.socket
		systemctl stop banter.service
		systemctl start banter.socket $running
		listen >"$noted"
	fi
	systemctl list-units --plain --no-legend --state=active 'banter-worker@*.service' |
		while read -r worker _; do
			systemctl try-restart "$worker"
		done
	;;
esac

#!/bin/sh
# End one Ray and no other on this machine: the processes whose command line names its folder, by their ids.
#   sh cluster/end_ray.sh /tmp/zeroflow-ray
set -eu
folder=${1:?the --temp-dir that this Ray was started with}
# Ids of its processes but for those that run the program $1.
of_it_but() {
    for process in /proc/[0-9]*; do
        id=${process#/proc/}
        # Its daemons have their session's folder as an argument; workers end with their daemon.
        if [ "$id" != $$ ] && tr '\0' '\n' 2>/dev/null <"$process/cmdline" | grep -qF -- "$folder/session_" &&
            [ "$(cat "$process/comm" 2>/dev/null)" != "$1" ]; then
            echo "$id"
        fi
    done
}
end_all_but() {
    for signal in TERM KILL; do
        ids=$(of_it_but "$1")
        [ -n "$ids" ] || return 0
        kill -s "$signal" $ids 2>/dev/null || true
        for wait in 1 2 3 4 5 6 7 8 9 10; do
            [ -n "$(of_it_but "$1")" ] || return 0
            sleep 1
        done
    done
}
# The GCS last: the others take their leave of it, and wait for one that is gone until they are killed.
end_all_but gcs_server
end_all_but nothing

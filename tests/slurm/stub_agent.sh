#!/usr/bin/env bash
# Stands for `python -m megatune agent ...` in tests of the job's script: trains nothing, starts at once.
#
# It writes what it was given to $STUB_FOLDER/<job>-<restarts>-<node>.{args,env}, NUL between words, then does what
# $STUB_PLAN says for this start (words, one a start; the last one again for all that follow):
#   done      a checkpoint, and the end          code N    ends with exit code N
#   wait      until it is asked to stop: a checkpoint, exit code 75        deaf   until it is killed
#   sleep     a moment, then as done         lose   node2 is lost with its agent, the others' agents say so
set -u
args=("$@")
while [[ $# -gt 0 ]]; do
    case $1 in
        --nodes) nodes=$2 ;;
        --node-rank) node=$2 ;;
        --logs) logs=$2 ;;
        --generation) generation=$2 ;;
    esac
    [[ $1 == -- ]] && break
    shift
done
mark=$STUB_FOLDER/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$node
printf '%s\0' "${args[@]}" >"$mark.args"
env -0 >"$mark.env"
mkdir -p "$logs/gen-$generation"
echo "node $node of start $generation" | tee -a "$logs/gen-$generation/node-$node.log"
echo "a line of rank $node" >>"$logs/gen-$generation/rank-0000$node.log"

saved() {
    [[ $node -eq 0 ]] || return 0
    local step
    step=$(printf 'step-%06d' $(($(find "$STUB_RUN/checkpoints" -name 'step-*' 2>/dev/null | wc -l) + 1)))
    mkdir -p "$STUB_RUN/checkpoints/$step" && echo '{}' >"$STUB_RUN/checkpoints/$step/manifest.json"
}
asked=""
trap 'asked=1' USR1 TERM

starts=$(find "$STUB_FOLDER" -name "*-$node.args" | wc -l)
read -ra plan <<<"$STUB_PLAN"
[[ $starts -le ${#plan[@]} ]] || starts=${#plan[@]}
case ${plan[starts - 1]} in
    done) saved ;;
    sleep) sleep 1; saved ;;
    lose)
        # The shell that would write down its exit code, too.
        [[ $SLURMD_NODENAME != node2 ]] || { kill -9 "$PPID" $$; sleep 60; }
        sleep 1
        [[ $nodes -eq 1 ]] || exit 76
        saved
        ;;
    code*) exit "${plan[starts - 1]#code}" ;;
    deaf) while :; do sleep 0.2; done ;;
    wait)
        touch "$mark.waits"
        while [[ -z $asked ]]; do sleep 0.1 2>/dev/null; done
        saved
        exit 75
        ;;
esac

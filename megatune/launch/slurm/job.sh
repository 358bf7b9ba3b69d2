# The code of a job, the same in every one: it uses only the variables above, and never as code.
#
# It starts one agent on each node and waits for them, asks them to save and stop when the time limit or a preemption
# comes near, and decides by what they say at the end: done, requeue, hand over to the next job of a chain, give up.
# Its arguments: the number of this job in its chain and the id of the chain's first job (default: 1, this job).

set -o pipefail

link=${1:-1}
first=${2:-$SLURM_JOB_ID}
state=$folder/slurm/$first        # jobs/<id>, and marks: stop, done, failed, requeue
logs=$folder/logs/slurm-$SLURM_JOB_ID
restarts=${SLURM_RESTART_COUNT:-0}
left_nodes=$state/left-$SLURM_JOB_ID   # nodes that this job stays away from
ends=$logs/ends-$restarts        # what each node's agent ended with
asked=""                         # set once the run has been asked to stop

say() { printf 'megatune: %s\n' "$*"; }

# watched COMMAND...: run it, pass USR1 and TERM on to it (as USR1: save and stop), and return its exit code.
#
# `wait` is asked only once the command has ended: one that a trap interrupts may lose the exit code (bash 5.2 returns
# -1 or 127 then). Meanwhile `read` sleeps on a pipe that nobody writes to; a signal wakes it.
watched() {
    local child="" pipe
    trap 'asked=1; [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null' USR1 TERM
    "$@" </dev/null &
    child=$!
    [[ -z $asked ]] || kill -USR1 "$child" 2>/dev/null
    exec {pipe}<> <(:)
    while kill -0 "$child" 2>/dev/null; do read -r -t 0.2 -u "$pipe"; done
    exec {pipe}>&-
    trap 'asked=1' USR1 TERM
    wait "$child"
}

# On each node: which one is this? Then the agent. Arguments: folder for exit codes, number of nodes, their names,
# the agent's command; `@RANK@` in it is the number of this node.
on_node() {
    local ends=$1 count=$2 rank=0 name code words=() word
    shift 2
    for name in "${@:1:count}"; do
        [[ $name == "$SLURMD_NODENAME" ]] && break
        rank=$((rank + 1))
    done
    shift "$count"
    if [[ $rank -eq $count ]]; then
        echo "megatune: node $SLURMD_NODENAME is not in the job's list of nodes" >&2
        return 1
    fi
    for word in "$@"; do
        [[ $word == @RANK@ ]] && word=$rank
        words+=("$word")
    done
    asked=""
    watched "${words[@]}"
    code=$?
    [[ -n $asked && ($code -eq 138 || $code -eq 143) ]] && code=75 # asked before it could listen
    printf '%s\n' "$code" >"$ends/.$rank" && mv -f "$ends/.$rank" "$ends/$rank"
    return "$code"
}

is_address() { [[ $1 =~ ^[0-9]+(\.[0-9]+){3}$ || $1 == *:*:* ]]; }

# address NODE: where the other nodes reach it, without asking DNS if Slurm or the hosts file knows.
address() {
    local node=$1 known name found
    known=$(scontrol show node -o "$node" 2>/dev/null | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2-)
    is_address "$known" && { printf '%s\n' "$known"; return; }
    for name in $known "$node"; do
        # A host's own name often means 127.0.1.1, which is of no use to the others.
        found=$(getent ahosts "$name" 2>/dev/null | awk '$1 !~ /^(127\.|::1$|fe80:)/ { print $1; exit }')
        [[ -n $found ]] && { printf '%s\n' "$found"; return; }
    done
    if [[ $node == "${SLURMD_NODENAME:-}" ]]; then
        found=$(hostname -I 2>/dev/null | awk '{ print $1 }')
        [[ -n $found ]] && { printf '%s\n' "$found"; return; }
    fi
    printf '%s\n' "$node"
}

# The fewest CPUs that a node of this job has: `4(x2),3` -> 3.
fewest_cpus() {
    tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}" | sed 's/(.*//' | sort -n | head -n 1
}

# Container words, if there is a container; every variable that we set is named, else the image's own would win.
prepare_container() {
    local pair names=PYTHONUNBUFFERED,MEGATUNE_SECRET,SLURM_JOB_ID,SLURMD_NODENAME mount
    launcher=() step=()
    case $container in
        pyxis)
            for pair in "${environment[@]}"; do names+=,${pair%%=*}; done
            step=(--container-image="$image" --container-workdir="$workdir" --container-env="$names")
            [[ ${#mounts[@]} -eq 0 ]] || step+=(--container-mounts="$(IFS=,; printf '%s' "${mounts[*]}")")
            step+=("${container_options[@]}")
            ;;
        apptainer)
            for pair in "${environment[@]}" PYTHONUNBUFFERED=1; do
                environment+=("APPTAINERENV_$pair" "SINGULARITYENV_$pair")
            done
            export APPTAINERENV_MEGATUNE_SECRET=$MEGATUNE_SECRET SINGULARITYENV_MEGATUNE_SECRET=$MEGATUNE_SECRET
            launcher=(apptainer exec --pwd "$workdir")
            [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || launcher+=(--nv)
            for mount in "${mounts[@]}"; do launcher+=(--bind "$mount"); done
            launcher+=("${container_options[@]}" "$image")
            ;;
    esac
}

# Start the agents and wait for them. Exit codes are left in $ends: srun's own is but the largest of them, and 0 where
# a node was lost.
run_agents() {
    local nodes launcher step head port cpus per_node=$processes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [[ $per_node != auto ]] || per_node=${SLURM_GPUS_ON_NODE:-$cpu_processes}
    # The agents let nobody in who does not know this; it is never written anywhere.
    MEGATUNE_SECRET=$(head -c 32 /dev/urandom | od -An -v -t x1 | tr -d ' \n')
    export MEGATUNE_SECRET
    prepare_container
    head=$(address "${nodes[0]}")
    [[ $head != *:* ]] || head="[$head]"
    # Another port for each start, so that nobody left over from the one before is met.
    port=$((20000 + (SLURM_JOB_ID * 7 + restarts) % 12000))
    cpus=$(fewest_cpus)
    count=${#nodes[@]}
    printf '%s\n' "${nodes[@]}" >"$ends/.nodes"
    say "job $SLURM_JOB_ID, start $((restarts + 1)): $count nodes x $per_node processes, meeting at $head:$port"
    # A step does not inherit --cpus-per-task; nor must one agent's end take the others before they have saved.
    watched env PYTHONUNBUFFERED=1 "${environment[@]}" srun --nodes="$count" --ntasks="$count" \
        --ntasks-per-node=1 --cpus-per-task="$cpus" --mpi=none --export=ALL \
        --kill-on-bad-exit=0 --wait=300 "${step[@]}" "${srun_options[@]}" \
        bash -c "$(declare -f watched on_node); asked=''; on_node \"\$@\"" megatune "$ends" "$count" "${nodes[@]}" \
        "${launcher[@]}" "$python" -m megatune agent --nodes "$count" --node-rank @RANK@ --nproc "$per_node" \
        --endpoint "$head:$port" --run-id "slurm-$SLURM_JOB_ID" --generation "$restarts" --logs "$logs" \
        -- train "$config" "${overrides[@]}"
}

# One code for all nodes: 2 (the user's mistake) or 77 (it will not get better) before any other failure, then 75
# (stopped), then 0.
verdict() {
    local rank code bad="" stopped=""
    for ((rank = 0; rank < count; rank++)); do
        code=255 # it could not say: the node was lost, or the step never began
        [[ -r $ends/$rank ]] && read -r code <"$ends/$rank"
        case $code in
            0) ;;
            2 | 77) echo "$code"; return ;;
            75) stopped=1 ;;
            *) bad=${bad:-$code} ;;
        esac
    done
    if [[ -n $bad ]]; then echo "$bad"; elif [[ -n $stopped ]]; then echo 75; else echo 0; fi
}

checkpoints() { (cd -- "$folder/checkpoints" 2>/dev/null && printf '%s ' step-*/manifest.json); }

# How many starts in a row, this one included, brought no new checkpoint. Argument: those at the start.
stalled() {
    local times=0
    if [[ $(checkpoints) == "$1" ]]; then
        [[ -r $state/stalled ]] && times=$(<"$state/stalled")
        times=$((times + 1))
    fi
    printf '%s' "$times" | tee "$state/stalled"
}

# Cancel the jobs of this chain that come after this one.
end_chain() {
    local path number
    for path in "$state"/jobs/*; do
        [[ -r $path ]] && read -r number <"$path" || continue
        [[ $number -le $link ]] || scancel "${path##*/}" 2>/dev/null
    done
}

# Nodes whose agent was lost in each of the last $exclude_after starts in which they took part: another agent said so
# (76), theirs was killed or had no word. Where nobody had a word, nobody is blamed.
lost_nodes() {
    local start path names rank code node witness
    local -A times=() held=()
    for ((start = restarts; start >= 0; start--)); do
        path=$logs/ends-$start
        [[ -r $path/.nodes ]] || continue
        mapfile -t names <"$path/.nodes"
        witness=""
        for rank in "${!names[@]}"; do
            [[ -r $path/$rank && $(<"$path/$rank") == 76 ]] && witness=1
        done
        for rank in "${!names[@]}"; do
            node=${names[rank]} code=255
            [[ -r $path/$rank ]] && read -r code <"$path/$rank"
            if [[ -z $witness || $code -lt 128 ]]; then
                held[$node]=1
            elif [[ -z ${held[$node]:-} ]]; then
                times[$node]=$((${times[$node]:-0} + 1))
            fi
        done
    done
    for node in "${!times[@]}"; do
        [[ ${times[$node]} -lt $exclude_after ]] || printf '%s\n' "$node"
    done | sort
}

# Those of `lost_nodes` that this job has not tried to leave yet, where its partition has enough nodes without them.
# $left_nodes: a file with those that it has.
nodes_to_leave() {
    local node left bad=()
    [[ $exclude_after -gt 0 && $requeue == true ]] || return 0
    touch -- "$left_nodes"
    mapfile -t bad < <(lost_nodes | grep -vxF -f "$left_nodes")
    [[ ${#bad[@]} -gt 0 ]] || return 0
    left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u |
        grep -vxF -f "$left_nodes" | grep -vcxF -f <(printf '%s\n' "${bad[@]}"))
    if [[ $left -lt $fewest_nodes ]]; then
        say "${bad[*]}: lost $exclude_after times in a row, but the partition has not enough other nodes" >&2
        return 0
    fi
    printf '%s\n' "${bad[@]}"
}

# Keep this job, which is back in the queue, away from nodes. Slurm changes the list of waiting jobs only.
leave() {
    local list try
    printf '%s\n' "$@" >>"$left_nodes"
    list=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2-)
    [[ $list != "(null)" ]] || list=""
    list=$(IFS=,; printf '%s' "${list:+$list,}$*")
    for try in 1 2 3 4 5 6; do
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$list" && {
            say "$*: lost $exclude_after times in a row, the job stays away from now on (slurm.exclude_after)"
            return
        }
        sleep 0.5
    done
    say "$*: lost $exclude_after times in a row, but Slurm did not let the job stay away"
}

preempted() { scontrol show job -o "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }

# Put this job back into the queue; Slurm ends this script meanwhile. Returns only where that cannot be.
requeue_job() {
    local now try bad
    mapfile -t bad < <(nodes_to_leave)
    now=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null)
    if [[ $now != RUNNING ]]; then
        say "the job is ${now:-unknown} to Slurm, which decides how it goes on"
        return 1
    fi
    for try in 1 2 3; do
        scontrol requeue "$SLURM_JOB_ID" && {
            say "requeued"
            [[ ${#bad[@]} -eq 0 ]] || leave "${bad[@]}"
            exit 75
        }
        sleep $((try * 2))
    done
    say "the job could not be requeued: submit it again to go on"
    return 1
}

finish() {
    local code=$1 before=$2 tries
    if [[ $code -eq 0 ]]; then
        : >"$state/done"
        end_chain
        say "done"
        exit 0
    fi
    if [[ -e $state/stop ]]; then
        end_chain
        say "stopped as asked; submit again to go on"
        exit "$code"
    fi
    if [[ $code -eq 2 || $code -eq 77 ]]; then
        : >"$state/failed"
        end_chain
        say "starting it again would not help: see the message above"
        exit "$code"
    fi
    if [[ $code -eq 75 ]] && preempted; then
        [[ $requeue != true ]] || requeue_job
        exit 75
    fi
    tries=$(stalled "$before")
    if [[ $tries -gt $retries ]]; then
        : >"$state/failed"
        end_chain
        say "given up: $tries starts in a row brought no new checkpoint (the last one ended with exit code $code)"
        exit "$code"
    fi
    if [[ -e $state/requeue ]]; then
        rm -f -- "$state/requeue"
        requeue_job
    elif [[ $code -eq 75 && $chain -gt 1 ]]; then
        [[ $link -lt $chain ]] && { say "job $((link + 1)) of $chain goes on"; exit 0; }
        say "the chain is used up; submit again to go on"
    elif [[ $requeue == true ]]; then
        requeue_job
    fi
    exit "$code"
}

# Whether the job before this one in the chain was cancelled by a person: then the chain ends.
cancelled_before() {
    local path number
    for path in "$state"/jobs/*; do
        read -r number <"$path"
        [[ $number -eq $((link - 1)) ]] || continue
        [[ $(squeue -h -t all -j "${path##*/}" -o %T 2>/dev/null) == CANCELLED ]] && return 0
    done
    return 1
}

main() {
    local count=0 before
    trap 'asked=1' USR1 TERM
    mkdir -p -- "$state/jobs" "$ends" || exit 1
    printf '%s\n' "$link" >"$state/jobs/$SLURM_JOB_ID"
    [[ $link -eq 1 ]] || ! cancelled_before || : >"$state/stop"
    [[ ! -e $state/done ]] || { say "the run is done"; exit 0; }
    [[ ! -e $state/stop ]] || { say "stopped as asked; submit again to go on"; exit 75; }
    [[ ! -e $state/failed ]] || { say "an earlier job of this chain gave up; see its output"; exit 1; }
    # Slurm itself puts a job back whose node it finds dead, and may give it the same nodes again.
    if [[ $restarts -gt 0 ]] && comm -12 <(nodes_to_leave 2>/dev/null) <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort) | grep -q .; then
        trap '' USR1 TERM
        requeue_job
        trap 'asked=1' USR1 TERM
    fi
    cd -- "$workdir" || exit 1
    before=$(checkpoints)
    if [[ -n $setup ]]; then
        # shellcheck disable=SC1090
        source "$setup" || { say "slurm.setup: $setup failed with exit code $?"; finish 2 "$before"; }
    fi
    run_agents
    # A network file system may show the others' words a little later.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [[ $(ls -- "$ends" | wc -l) -lt $count ]] || break
        sleep 1
    done
    trap '' USR1 TERM
    finish "$(verdict)" "$before"
}

main

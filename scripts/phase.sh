# shellcheck shell=bash
# Sourced by scripts that run one thing after another: phase NAME COMMAND... runs the command, prints its time, and goes on
# after a failure; phases_done prints all times and fails if one failed.
PHASE_FAILED=() PHASE_TIMES=()
phase() {
  local name=$1 start=$SECONDS status=0
  shift
  printf '\n=== %s\n' "$name"
  "$@" || status=$?
  PHASE_TIMES+=("$(printf '%-24s %5d s  %s' "$name" $((SECONDS - start)) "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")")")
  printf -- '--- %s\n' "${PHASE_TIMES[-1]}"
  [ $status = 0 ] || PHASE_FAILED+=("$name")
}
phases_done() {
  printf '\n=== times\n'
  printf '%s\n' "${PHASE_TIMES[@]}"
  printf '%-24s %5d s\n' total $SECONDS
  [ ${#PHASE_FAILED[@]} = 0 ] && return 0
  printf 'failed: %s\n' "${PHASE_FAILED[*]}"
  return 1
}

#!/usr/bin/env bash
# Run the commands of a file, one a line, one after the other, for a limited time:
#
#     bash run_rows.sh rows.txt 540
#
# When the time is up, the command that is running gets the signal of Ctrl-C, at which a training writes a checkpoint
# and stops; what has not stopped a minute later is killed. Called again it skips the commands that are listed as done in
# rows.txt.done, so give each training `--resume_from_checkpoint last`.
set -u
rows=$1 seconds=$2 failed=0
touch "$rows.done"
while IFS= read -r row <&3 || [[ $row ]]; do
    if [[ $row =~ ^[[:space:]]*(#|$) ]] || grep -qxF -- "$row" "$rows.done"; then
        continue
    fi
    left=$((seconds - SECONDS))
    ((left > 0)) || exit 124
    echo "== $row"
    # The shell stays the parent (hence exit), so that the command gets the signal to the group, and gets it once
    timeout --signal INT --kill-after 60 "$left" bash -c "$row"$'\nexit $?' 3<&-
    status=$?
    case $status in
        0) echo "$row" >> "$rows.done" ;;
        124 | 137) exit 124 ;;
        *) echo "== failed with status $status: $row" >&2; failed=1 ;;
    esac
done 3< "$rows"
exit $failed

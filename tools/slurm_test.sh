#!/usr/bin/env bash
# The old name of slurm.sh test, for one release.
exec bash "$(dirname "$0")/slurm.sh" test "$@"

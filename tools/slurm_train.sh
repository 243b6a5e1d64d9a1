#!/usr/bin/env bash
# The old name of slurm.sh train, for one release.
exec bash "$(dirname "$0")/slurm.sh" train "$@"

#!/usr/bin/env bash
# The old name of dist.sh test, for one release.
exec bash "$(dirname "$0")/dist.sh" test "$@"

#!/bin/sh
# What the image starts: the server with the given flags, or with SageMaker's word `serve`; another command as it is.
# It execs, so that process 1 is the server itself and gets the signals.
set -eu
case "${1-}" in
  "" | serve | -*) exec /opt/weir/bin/python -m serving "$@" ;;
  *) exec "$@" ;;
esac

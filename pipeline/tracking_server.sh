#!/bin/bash
# The MLflow server of a cluster's head: bash pipeline/tracking_server.sh <address it listens on>
#
# Its database is ~/m2f/tracking/mlflow.db (or MLFLOW_BACKEND_STORE_URI), its artifacts lie in the storage root: both outlive the
# cluster. One that runs already is left alone, one that ends is started again. Returns when it answers.
set -euo pipefail
address=$1
if [ "${2-}" != keep-running ]; then
  mkdir -p ~/m2f/tracking
  # a session and a lock of its own: it outlives the ssh connection, and there is one
  setsid flock --nonblock --no-fork ~/m2f/tracking/server.lock bash "$0" "$address" keep-running \
    >>~/m2f/tracking/server.log 2>&1 </dev/null &
  for _ in $(seq 240); do
    (exec 3<>"/dev/tcp/$address/5000") 2>/dev/null && exit 0
    sleep 0.5
  done
  echo "error: the tracking server does not answer at $address:5000 after 2 minutes; see ~/m2f/tracking/server.log" >&2
  exit 1
fi
# from the environment, not the command line: the database may be an address with a password
export MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$HOME/m2f/tracking/mlflow.db}
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
while true; do
  mlflow server --artifacts-destination "$M2F_STORAGE/mlflow" --host "$address" --port 5000 --workers 1 || true
  sleep 2
done

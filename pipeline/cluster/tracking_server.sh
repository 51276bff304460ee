#!/bin/bash
# The MLflow server of a cluster's head: bash pipeline/cluster/tracking_server.sh <address it listens on>
#
# Its database is ~/m2f/tracking/mlflow.db (or MLFLOW_BACKEND_STORE_URI), its artifacts lie in the storage root: both outlive the
# cluster. One that runs already is left alone, one that ends is started again. Returns when it answers.
#
# It answers who calls it <address>, localhost or 127.0.0.1, or one of MLFLOW_SERVER_ALLOWED_HOSTS. Where there is a
# ~/.mlflow/credentials, it wants the user and password in it; without, whoever reaches it gets in. See docs/security.md.
set -euo pipefail
address=$1
folder=~/m2f/tracking

# The login as shell commands; nothing of it on a command line, which everybody may read.
login() {
  python -c '
import configparser, os, secrets, shlex
try:
    there = configparser.ConfigParser()
    there.read(os.path.expanduser("~/.mlflow/credentials"))
    user, password = (there["mlflow"]["mlflow_tracking_" + key] for key in ("username", "password"))
except (configparser.Error, KeyError):  # whose message may quote the password
    raise SystemExit("error: ~/.mlflow/credentials is not in its format, which docs/security.md shows")
print("export", shlex.join(f"{key}={value}" for key, value in {
    "MLFLOW_AUTH_ADMIN_USERNAME": user,
    "MLFLOW_AUTH_ADMIN_PASSWORD": password,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
}.items()))'
}

if [ "${2-}" != keep-running ]; then
  mkdir -p "$folder"
  chmod 700 "$folder"
  if [ -e ~/.mlflow/credentials ]; then
    chmod 600 ~/.mlflow/credentials
    login >/dev/null
  fi
  # a session and a lock of its own: it outlives the ssh connection, and there is one
  setsid flock --nonblock --no-fork "$folder/server.lock" bash "$0" "$address" keep-running \
    >>"$folder/server.log" 2>&1 </dev/null &
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
# MLflow's own list has 10.*, which the name 10.example.org fits as well
MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:+$MLFLOW_SERVER_ALLOWED_HOSTS,}
export MLFLOW_SERVER_ALLOWED_HOSTS+="$address:5000,localhost,localhost:*,127.0.0.1,127.0.0.1:*"
options=()
if [ -e ~/.mlflow/credentials ]; then
  settings=$(login)
  eval "$settings"
  # one user, made anew at every start: what the file says counts
  (umask 077; rm -f "$folder/login.db"; printf '%s\n' '[mlflow]' "database_uri = sqlite:///$folder/login.db" \
    'default_permission = NO_PERMISSIONS' 'auth_cache_ttl_seconds = 60' >"$folder/login.ini"; : >"$folder/login.db")
  export MLFLOW_AUTH_CONFIG_PATH=$folder/login.ini
  options+=(--app-name basic-auth)
fi
# What it starts itself would keep the port when it alone is killed: it has a process group, which ends with it.
set -m
trap exit HUP INT TERM
trap 'kill -KILL -- "-$server" 2>/dev/null || true' EXIT
while true; do
  mlflow server --artifacts-destination "$M2F_STORAGE/mlflow" --host "$address" --port 5000 --workers 1 "${options[@]}" &
  server=$!
  wait "$server" || true
  kill -KILL -- "-$server" 2>/dev/null || true
  sleep 2
done

#!/bin/sh
set -e
test "$(sh ./app.sh 2 3)" = "sum: 5"
echo tested

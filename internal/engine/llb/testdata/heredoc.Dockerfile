FROM debian:12
COPY <<one <<two /etc/
1
one
2
two
RUN <<EOF
set -e
make
EOF

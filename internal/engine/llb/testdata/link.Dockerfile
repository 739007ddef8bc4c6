FROM debian:12
COPY --link a /a
COPY --link --from=busybox:1 /bin/busybox /bin/

FROM golang:1 AS build
WORKDIR /src
COPY . .
RUN go build -o /out
FROM build AS unused
RUN false
FROM debian:12
COPY --from=build /out /usr/bin/app
COPY --from=busybox:1 /bin/busybox /bin/

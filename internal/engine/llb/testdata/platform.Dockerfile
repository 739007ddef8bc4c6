FROM --platform=$BUILDPLATFORM golang:1 AS b
ARG TARGETARCH
RUN GOARCH=$TARGETARCH go build
FROM debian:12
COPY --from=b /out /out

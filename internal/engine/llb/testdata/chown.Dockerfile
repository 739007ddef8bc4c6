FROM debian:12
COPY --chown=www-data:adm a /a
COPY --chmod=u=rwX,go= dir /dir

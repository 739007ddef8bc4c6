'use strict';
const http = require('http');
const dayjs = require('dayjs');

if (process.argv.includes('--check')) {
  console.log('ok', dayjs('2026-01-01').format('YYYY'));
  process.exit(0);
}
http.createServer((req, res) => res.end(`it is ${dayjs().toISOString()}\n`)).listen(process.env.PORT || 3000);

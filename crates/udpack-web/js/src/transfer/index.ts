/** File transfer over a socket: uploads, downloads, and what the server does. A bundle of its own, because of BLAKE3. */

export { download, type DownloadOptions } from './download.js';
export { type Job, Jobs, jobs } from './jobs.js';
export { type Done, TransferError } from './messages.js';
export { type FileProgress, type IfExists, Upload, upload, type UploadOptions } from './upload.js';

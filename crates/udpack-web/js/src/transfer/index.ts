/** File transfer over a socket: uploads, downloads, and what the server does. A bundle of its own, because of BLAKE3. */

export { download, type DownloadOptions } from './download.js';
export { type FileProgress, type FileState, type IfExists } from './entry.js';
export { type Job, Jobs, jobs } from './jobs.js';
export { type Done, TransferError } from './messages.js';
export { type Dropped, dropped, type DroppedEntry, type Item, type Source, type Sources, walk } from './source.js';
export { Upload, upload, type UploadEvents, type UploadOptions, type UploadTotal } from './upload.js';
